"""The Triton kernel behind ``rms_norm_rope``: a row of all heads is loaded once, normed, rotated and stored."""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.kernels.arguments import RmsNormRope
from fxq.kernels.device import inverse_root
from fxq.kernels.jit import Pointer, Scalar, constexpr, jit, tl, triton
from fxq.kernels.rows import flat_rows


@jit
def rms_norm_rope_kernel(
    x_ptr: Pointer,
    weight_ptr: Pointer,
    cos_ptr: Pointer,
    sin_ptr: Pointer,
    y_ptr: Pointer,
    S: Scalar,
    K: Scalar,
    x_stride: Scalar,
    cos_stride: Scalar,
    sin_stride: Scalar,
    eps: Scalar,
    HALF: constexpr,
    NORM: constexpr,
    ROTATE: constexpr,
    BLOCK: constexpr,
) -> None:
    """One row of K channels; S rows have a row of cos and of sin each; HALF is half of a head's channels."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    # [BLOCK]: all heads of one position; zeros beyond K leave the sum of squares alone.
    x = tl.load(x_ptr + row.to(tl.int64) * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        # One norm over all heads; NaN where the squares overflow, as in the reference.
        x = x * inverse_root(tl.sum(x * x) / K + eps)
        x = x * tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        pair = tl.arange(0, BLOCK // 2)
        # The tables are [S, HALF], the same for every head and batch entry. pair % HALF is always inside a row of
        # them: loads beyond K need no mask. [BLOCK / 2] each.
        position = (row % S).to(tl.int64)
        cos = tl.load(cos_ptr + position * cos_stride + pair % HALF)
        sin = tl.load(sin_ptr + position * sin_stride + pair % HALF)
        # Neighbouring channels are a pair: [BLOCK / 2, 2] holds one per row.
        even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))
    tl.store(y_ptr + row.to(tl.int64) * K + columns, x.to(y_ptr.dtype.element_ty), mask=inside)


def launch(a: RmsNormRope, *, out: Tensor | None = None) -> Tensor:
    """Run the Triton kernel on the current device; see :func:`fxq.kernels.rope.op.rms_norm_rope`.

    Rows of x may lie apart, as in a slice of a merged query, key and value result. ``out``, contiguous of x's dtype,
    is allocated when it is not given.
    """
    x, weight, eps, cos, sin, heads = a
    batch, positions, width = x.shape
    rows = flat_rows(x)
    tables = [None if t is None else flat_rows(t) for t in (cos, sin)]
    shape = (batch, positions, heads, width // heads)
    y = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    block = max(16, triton.next_power_of_2(width))
    if y.numel():
        rms_norm_rope_kernel[(rows.shape[0],)](
            rows,
            None if weight is None else weight.contiguous(),
            *tables,
            y,
            S=positions,
            K=width,
            x_stride=rows.stride(0),
            cos_stride=0 if tables[0] is None else tables[0].stride(0),
            sin_stride=0 if tables[1] is None else tables[1].stride(0),
            eps=eps,
            HALF=width // heads // 2,
            NORM=weight is not None,
            ROTATE=cos is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return y
