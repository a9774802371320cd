"""Attention to a cache whose old tokens are encoded: the operator, and how its native and its Triton kernels read them.

Nothing here encodes: codecs are written above this package.
"""
