"""The Triton kernel behind ``norm_quantize_per_token`` and ``norm_quantize_per_token_asymmetric``.

A row stays in registers from its only load to the store of its integers: the norm of :mod:`fxq.kernels.norm.triton`,
then the scales of :mod:`fxq.kernels.quantize.triton_per_token`.
"""

from __future__ import annotations

from torch import Tensor

from fxq import numerics
from fxq.kernels.arguments import NormQuantizePerToken
from fxq.kernels.jit import Pointer, Scalar, constexpr, jit, tl, triton
from fxq.kernels.norm.triton import norm_arguments, normed_row
from fxq.kernels.quantize.triton_per_token import quantize_whole
from fxq.kernels.rows import warps_of


@jit
def norm_quantize_per_token_kernel(
    x_ptr: Pointer,
    weight_ptr: Pointer,
    bias_ptr: Pointer,
    gain_ptr: Pointer,
    shift_ptr: Pointer,
    perm_ptr: Pointer,
    q_ptr: Pointer,
    scale_ptr: Pointer,
    K: Scalar,
    split: Scalar,
    x_stride: Scalar,
    gain_stride: Scalar,
    shift_stride: Scalar,
    frame_rows: Scalar,
    eps: Scalar,
    least: Scalar,
    WEIGHT: constexpr,
    BIAS: constexpr,
    MODULATED: constexpr,
    GATHER: constexpr,
    DUAL: constexpr,
    ASYMMETRIC: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
    BLOCK: constexpr,
) -> None:
    """One row; LOW is ``-HIGH``, but for ASYMMETRIC, which stores zero points behind the scales."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    y = normed_row(
        x_ptr + row.to(tl.int64) * x_stride,
        weight_ptr,
        bias_ptr,
        gain_ptr,
        shift_ptr,
        perm_ptr,
        row,
        columns,
        K,
        gain_stride,
        shift_stride,
        frame_rows,
        eps,
        WEIGHT,
        BIAS,
        MODULATED,
        GATHER,
    )
    if GATHER:
        y = tl.where(columns < K, y, 0.0)  # [BLOCK]; channel 0 again would count as an outlier
    quantize_whole(
        y,
        columns,
        q_ptr + row.to(tl.int64) * K,
        scale_ptr,
        row.to(tl.int64),
        K,
        split,
        least,
        LOW,
        HIGH,
        DUAL,
        ASYMMETRIC,
    )


def launch(a: NormQuantizePerToken, out: tuple[Tensor, Tensor], *, asymmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel on the current device; see :mod:`fxq.kernels.norm.per_token`.

    Args:
        a: of the operator.
        out: integers and scales, contiguous, filled and returned.
        asymmetric: whether zero points lie behind the scales.

    Raises:
        ValueError: when a row is wider than ``MAX_WIDTH``.
    """
    width, (low, high) = a.x.shape[-1], numerics.integer_range(a.bits)
    arguments, (q, scale) = norm_arguments(a), out
    block = max(16, triton.next_power_of_2(width))
    if q.numel():
        norm_quantize_per_token_kernel[(q.numel() // width,)](
            perm_ptr=None if a.perm is None else a.perm.contiguous(),
            q_ptr=q,
            scale_ptr=scale,
            split=a.split,
            least=numerics.LEAST_HALF_RANGE if asymmetric else numerics.LEAST_MAGNITUDE,
            GATHER=a.perm is not None,
            DUAL=a.split < width,
            ASYMMETRIC=asymmetric,
            LOW=low if asymmetric else -high,
            HIGH=high,
            BLOCK=block,
            num_warps=warps_of(block),
            **arguments,
        )
    return out
