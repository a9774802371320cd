"""Passes, one per file. The order is the line of :mod:`fxq.quantize`: plan, calibrate, rewrite, freeze."""

from __future__ import annotations

from fxq.passes.apply_methods import ApplyMethods
from fxq.passes.detect_outliers import DetectOutliers, OutlierChannels, detect_outliers
from fxq.passes.freeze import Freeze
from fxq.passes.lower_linear import LoweringError, LowerLinear
from fxq.passes.plan_layers import PlanLayers

ORDER = (PlanLayers, DetectOutliers, ApplyMethods, LowerLinear, Freeze)
"""The shipped passes in the order they run; calibration comes after DetectOutliers."""

__all__ = [
    "ORDER",
    "ApplyMethods",
    "DetectOutliers",
    "Freeze",
    "LowerLinear",
    "LoweringError",
    "OutlierChannels",
    "PlanLayers",
    "detect_outliers",
]

if __name__ != "fxq.passes":
    raise ImportError("import fxq.passes")
