"""Attention over keys and values that lie in pieces: operator and reference.

Nothing here keeps a cache.
"""
