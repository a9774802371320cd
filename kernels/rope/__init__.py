"""The root-mean-square norm of queries and keys and their rotation: operator, reference, Triton.

Nothing here makes rotation tables.
"""
