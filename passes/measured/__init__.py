"""Rewrites of a frozen graph that follow the times of kernels on this machine, and where those times are kept.

Nothing here chooses between results: each way computes the layer as well as the other.
"""
