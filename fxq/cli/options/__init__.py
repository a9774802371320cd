"""Options that several commands share, and what they come to: models and their files, caches, videos, output.

Nothing here is a command.
"""
