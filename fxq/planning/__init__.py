"""What to expect before anything runs: memory and speed from shapes, and what this machine can do.

Nothing here loads weights or runs a model on data.
"""
