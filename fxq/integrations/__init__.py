"""Quantized layers inside other frameworks: swapped modules, torch.compile, diffusers.

Nothing here computes scales or integers, and nothing of the line above imports it.
"""
