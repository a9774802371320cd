"""Finished bundles of one model beside full precision: the same noise, videos, per-chunk errors, times and memory.

Nothing here quantizes, and nothing is measured twice.
"""
