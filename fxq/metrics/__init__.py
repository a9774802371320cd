"""Measures of quantized against full-precision video.

Nothing here prints or draws.
"""
