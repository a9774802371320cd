"""Operators on quantized tensors. Importing this package registers them as ``torch.ops.fxq.*``.

Nothing here knows layers, graphs or recipes: numerics is all it imports of fxq.
"""

from collections.abc import Mapping

from torch import Tensor

from fxq.kernels import native
from fxq.kernels.attention.absorb import absorb
from fxq.kernels.attention.eight_bits.int8 import attention_int8
from fxq.kernels.attention.eight_bits.int8_fp8 import IN_16_BITS, attention_int8_fp8
from fxq.kernels.attention.encoded.packed import attention_packed
from fxq.kernels.attention.op import attention
from fxq.kernels.attention.weighted import attention_weighted
from fxq.kernels.gemm import fp8
from fxq.kernels.gemm.activated import activation_quantize_per_token, activation_quantize_per_token_asymmetric
from fxq.kernels.gemm.epilogues import (
    dual_scale_linear_add,
    dual_scale_linear_per_token_add,
    dual_scale_linear_quantize,
)
from fxq.kernels.gemm.fp8 import (
    dual_scale_linear_fp8,
    dual_scale_linear_fp8_per_token,
    quantize_fp8,
    quantize_fp8_per_token,
)
from fxq.kernels.gemm.op import dual_scale_linear
from fxq.kernels.gemm.per_token import (
    dual_scale_linear_per_token,
    quantize_per_token,
    quantize_per_token_asymmetric,
)
from fxq.kernels.norm.op import norm_quantize
from fxq.kernels.norm.per_token import norm_quantize_per_token, norm_quantize_per_token_asymmetric
from fxq.kernels.op import Op
from fxq.kernels.quantize.op import quantize_act
from fxq.kernels.rope.op import rms_norm_rope

OPS: tuple[Op, ...] = (
    quantize_act,
    norm_quantize,
    dual_scale_linear,
    dual_scale_linear_quantize,
    dual_scale_linear_add,
    rms_norm_rope,
    attention,
    attention_packed,
    absorb,
    attention_weighted,
    attention_int8,
    attention_int8_fp8,
    quantize_fp8,
    dual_scale_linear_fp8,
    quantize_fp8_per_token,
    dual_scale_linear_fp8_per_token,
    quantize_per_token,
    quantize_per_token_asymmetric,
    dual_scale_linear_per_token,
    norm_quantize_per_token,
    norm_quantize_per_token_asymmetric,
    dual_scale_linear_per_token_add,
    activation_quantize_per_token,
    activation_quantize_per_token_asymmetric,
)

ATTENTIONS: Mapping[str, Op] = {"int8": attention_int8, "int8_fp8": attention_int8_fp8}
"""Scheme of a recipe -> the operator in 8 bits that takes the place of ``attention``, with the same arguments."""

FLOAT8: tuple[Op, ...] = (
    quantize_fp8,
    dual_scale_linear_fp8,
    quantize_fp8_per_token,
    dual_scale_linear_fp8_per_token,
)
"""Those that need float8, which GPUs have from sm_89 on."""

__all__ = [
    "ATTENTIONS",
    "FLOAT8",
    "OPS",
    "Op",
    "absorb",
    "activation_quantize_per_token",
    "activation_quantize_per_token_asymmetric",
    "attention",
    "attention_int8",
    "attention_int8_fp8",
    "attention_packed",
    "attention_weighted",
    "dual_scale_linear",
    "dual_scale_linear_add",
    "dual_scale_linear_fp8",
    "dual_scale_linear_fp8_per_token",
    "dual_scale_linear_per_token",
    "dual_scale_linear_per_token_add",
    "dual_scale_linear_quantize",
    "norm_quantize",
    "norm_quantize_per_token",
    "norm_quantize_per_token_asymmetric",
    "quantize_act",
    "quantize_fp8",
    "quantize_fp8_per_token",
    "quantize_per_token",
    "quantize_per_token_asymmetric",
    "rms_norm_rope",
    "used",
]


def used(op_name: str, device: str, weight: Tensor | None = None) -> str:
    """Name of the implementation of an operator that runs on a device type, for reports.

    Args:
        op_name: as "dual_scale_linear"; a leading "fxq::" and a trailing ".default" are ignored.
        device: as "cpu" or "cuda"; an index as in "cuda:0" is ignored.
        weight: of a linear; its layout chooses the kernel on a CPU.

    Returns:
        "triton", one of the native kernels ("native amx", "native", "native vnni", "native avx_vnni", "native avx2",
        "native i8mm", "native dotprod"), "int_mm", "float32" (a product of integers in floats, exact), "sdpa", "eager",
        "reference in float32" (of float8 on a CPU), "none" (of float8 on a GPU older than sm_89), "triton, values in 16
        bits" (of ``attention_int8_fp8`` on such a GPU), or "reference" where
        nothing faster is bound.

    Raises:
        ValueError: when there is no such operator.
    """
    name = op_name.removeprefix("fxq::").removesuffix(".default")
    kind = device.split(":", 1)[0]
    for op in OPS:
        if op.name == name:
            if op in FLOAT8 and fp8.unusable(device):
                return "none"
            if op is attention_int8_fp8 and op.used(kind) == "triton" and fp8.unusable(device):
                return IN_16_BITS
            panels = weight is not None and weight.ndim == 4
            return native.name() if kind == "cpu" and panels and native.ready() else op.used(kind)
    raise ValueError(f"no operator {op_name!r}: expected one of {', '.join(op.name for op in OPS)}")


if __name__ != "fxq.kernels":
    raise ImportError("import fxq.kernels")
