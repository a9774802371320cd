"""A graph as data: its JSON, the operators and arguments that are allowed in it, how calls nest.

Nothing here runs what it reads, or knows files and folders.
"""
