"""Measures of quantized against full-precision video."""
