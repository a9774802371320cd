"""What ``fxq demo`` runs on the shipped tiny model, from calibration to the report's numbers.

Nothing here is needed to quantize a model of one's own.
"""
