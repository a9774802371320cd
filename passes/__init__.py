"""Passes, one per file, and what it takes to write one. :mod:`fxq.passes.line` has their order.

Nothing here captures a model, calibrates or writes files.
"""

from __future__ import annotations

from fxq.core.ir import LayerPlan, QuantGraph, Stage, plan_of, planned, set_plan
from fxq.core.pipeline import Analysis, Pass, PassError, Rewrite, run_passes
from fxq.passes.absorb_cache import AbsorbCache, ObserveAttention, absorb_cache
from fxq.passes.apply_methods import ApplyMethods
from fxq.passes.choose_widths import ChooseWidths
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
from fxq.passes.measured.exact_where_faster import ExactWhereFaster
from fxq.passes.measured.float_where_faster import FloatWhereFaster
from fxq.passes.pack_cache import PackCache, pack_cache
from fxq.passes.plan_layers import PlanLayers
from fxq.passes.qdq.to_qdq import ToQdq
from fxq.passes.quantize_attention import QuantizeAttention
from fxq.passes.share_inputs import ShareInputs
from fxq.passes.transforms.balance import Balance
from fxq.passes.transforms.low_rank import LowRank
from fxq.passes.transforms.rotate import Rotate
from fxq.passes.transforms.smooth import Smooth

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
"""What :func:`fxq.optimize` runs by default on a frozen graph before the weights are laid out, in order."""

__all__ = [
    "FUSIONS",
    "AbsorbCache",
    "Analysis",
    "ApplyMethods",
    "Balance",
    "ChooseWidths",
    "DetectOutliers",
    "ExactWhereFaster",
    "FloatWhereFaster",
    "FoldPermutations",
    "Freeze",
    "FuseActivationQuantize",
    "FuseAttention",
    "FuseNormQuantize",
    "FuseResidual",
    "FuseRotary",
    "LayOutWeights",
    "LayerPlan",
    "LowRank",
    "LowerLinear",
    "LoweringError",
    "MergeLinears",
    "ObserveAttention",
    "OutlierChannels",
    "PackCache",
    "Pass",
    "PassError",
    "PlanLayers",
    "QuantGraph",
    "QuantizeAttention",
    "RealRope",
    "Rewrite",
    "Rotate",
    "ShareInputs",
    "Smooth",
    "Stage",
    "ToQdq",
    "absorb_cache",
    "detect_outliers",
    "make_rope_real",
    "pack_cache",
    "plan_of",
    "planned",
    "run_passes",
    "set_plan",
]

if __name__ != "fxq.passes":
    raise ImportError("import fxq.passes")
