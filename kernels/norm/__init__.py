"""Normalisation together with the quantization that follows it: operator, reference, Triton.

Nothing here multiplies matrices.
"""
