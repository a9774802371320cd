"""Several methods at several widths on one model: planned, measured row by row, pooled and written.

Nothing here quantizes or measures by itself: that is :mod:`fxq.lab` and :mod:`fxq.metrics`.
"""
