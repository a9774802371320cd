"""Measures of what is quantized against full precision: videos, latents, outputs, weights.

Nothing here prints or draws.
"""
