"""Passes, one per file. The order is the line of :mod:`fxq.quantize`: plan, calibrate, rewrite, freeze."""

from __future__ import annotations

from fxq.passes.apply_methods import ApplyMethods
from fxq.passes.detect_outliers import DetectOutliers, OutlierChannels, detect_outliers
from fxq.passes.freeze import Freeze
from fxq.passes.lay_out_weights import LayOutWeights
from fxq.passes.lower_linear import LoweringError, LowerLinear
from fxq.passes.plan_layers import PlanLayers
from fxq.pipeline import Rewrite

ORDER = (PlanLayers, DetectOutliers, ApplyMethods, LowerLinear, Freeze)
"""The shipped passes in the order they run; calibration comes after DetectOutliers."""

FUSIONS: tuple[Rewrite, ...] = ()
"""What :func:`fxq.optimize` runs on a frozen graph before the weights are laid out, in order."""

__all__ = [
    "FUSIONS",
    "ORDER",
    "ApplyMethods",
    "DetectOutliers",
    "Freeze",
    "LayOutWeights",
    "LowerLinear",
    "LoweringError",
    "OutlierChannels",
    "PlanLayers",
    "detect_outliers",
]

if __name__ != "fxq.passes":
    raise ImportError("import fxq.passes")
