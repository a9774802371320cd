"""Quantizing activations, with static scales or one per row: operator, reference, Triton.

Nothing here chooses scales from calibration data.
"""
