"""Attention whose products are of 8 bits: its definitions, and their kernels for GPUs.

Nothing here knows what a cache stores; kernels for CPUs are in :mod:`fxq.kernels.native`.
"""
