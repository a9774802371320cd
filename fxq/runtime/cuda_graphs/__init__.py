"""Calls of a module on a GPU, replayed from CUDA graphs: captures, the memory that they read, what cannot be captured.

Nothing here knows models or caches: only the shapes and the memory of tensors.
"""
