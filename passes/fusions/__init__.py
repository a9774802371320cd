"""Rewrites of a frozen graph into fewer passes over memory; :func:`fxq.optimize` runs them.

Nothing here changes what a graph computes, and each one leaves a remark where it could not.
"""
