"""Passes, one per file. The order is the line of :mod:`fxq.quantize`: plan, calibrate, rewrite, freeze."""

from __future__ import annotations

from fxq.passes.apply_methods import ApplyMethods
from fxq.passes.detect_outliers import DetectOutliers, OutlierChannels, detect_outliers
from fxq.passes.fold_permutations import FoldPermutations
from fxq.passes.freeze import Freeze
from fxq.passes.fuse_activation_quantize import FuseActivationQuantize
from fxq.passes.fuse_attention import FuseAttention
from fxq.passes.fuse_norm_quantize import FuseNormQuantize
from fxq.passes.fuse_residual import FuseResidual
from fxq.passes.fuse_rotary import FuseRotary
from fxq.passes.lay_out_weights import LayOutWeights
from fxq.passes.lower_linear import LoweringError, LowerLinear
from fxq.passes.merge_linears import MergeLinears
from fxq.passes.plan_layers import PlanLayers
from fxq.passes.real_rope import RealRope, make_rope_real
from fxq.passes.share_inputs import ShareInputs
from fxq.passes.to_qdq import ToQdq
from fxq.pipeline import Rewrite

ORDER = (PlanLayers, DetectOutliers, ShareInputs, ApplyMethods, LowerLinear, Freeze)
"""The shipped passes in the order they run; calibration comes after ShareInputs."""

FUSIONS: tuple[Rewrite, ...] = (
    RealRope(),
    MergeLinears(),
    FoldPermutations(),
    FuseAttention(),
    FuseRotary(),
    FuseNormQuantize(),
    FuseActivationQuantize(),
    FuseResidual(),
)
"""What :func:`fxq.optimize` runs on a frozen graph before the weights are laid out, in order."""

__all__ = [
    "FUSIONS",
    "ORDER",
    "ApplyMethods",
    "DetectOutliers",
    "FoldPermutations",
    "Freeze",
    "FuseActivationQuantize",
    "FuseAttention",
    "FuseNormQuantize",
    "FuseResidual",
    "FuseRotary",
    "LayOutWeights",
    "LowerLinear",
    "LoweringError",
    "MergeLinears",
    "OutlierChannels",
    "PlanLayers",
    "RealRope",
    "ShareInputs",
    "ToQdq",
    "detect_outliers",
    "make_rope_real",
]

if __name__ != "fxq.passes":
    raise ImportError("import fxq.passes")
