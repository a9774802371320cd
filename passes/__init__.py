"""Passes, one per file. The order is the line of :mod:`fxq.quantize`: plan, calibrate, rewrite, freeze.

Nothing here captures a model, calibrates or writes files.
"""

from __future__ import annotations

from fxq.core.pipeline import Rewrite
from fxq.passes.apply_methods import ApplyMethods
from fxq.passes.detect_outliers import DetectOutliers, OutlierChannels, detect_outliers
from fxq.passes.freeze import Freeze
from fxq.passes.fusions.fold_permutations import FoldPermutations
from fxq.passes.fusions.fuse_activation_quantize import FuseActivationQuantize
from fxq.passes.fusions.fuse_attention import FuseAttention
from fxq.passes.fusions.fuse_norm_quantize import FuseNormQuantize
from fxq.passes.fusions.fuse_residual import FuseResidual
from fxq.passes.fusions.fuse_rotary import FuseRotary
from fxq.passes.fusions.lay_out_weights import LayOutWeights
from fxq.passes.fusions.merge_linears import MergeLinears
from fxq.passes.fusions.real_rope import RealRope, make_rope_real
from fxq.passes.lower_linear import LoweringError, LowerLinear
from fxq.passes.plan_layers import PlanLayers
from fxq.passes.qdq.to_qdq import ToQdq
from fxq.passes.share_inputs import ShareInputs

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
