"""From a model to a TRACED graph: export, regions that are taken whole, masks and guards.

Nothing here chooses schemes or integers, or runs calibration data.
"""
