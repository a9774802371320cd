"""A local page on which models stream chunk by chunk, side by side from the same noise.

Nothing here measures for a report, and nothing leaves this machine.
"""
