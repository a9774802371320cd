"""What a captured graph may be called with: conditions as data, their check, the module that makes it.

Nothing here reads a graph or knows plans.
"""
