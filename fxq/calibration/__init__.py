"""Driving a model through its data: the adapter protocol, statistics, sensitivities, recorded calls.

Nothing here changes a graph or knows a model family.
"""
