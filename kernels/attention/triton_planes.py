"""The Triton kernel that makes dense tokens of a span of bit planes: codes, coefficients, basis, mean in one pass."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxq.kernels.attention.forms import Planes
from fxq.kernels.jit import Pointer, Scalar, constant, constexpr, jit, tl, triton

BLOCK_T, BLOCK_R, BLOCK_C = 64, 32, 64
"""Tokens, coefficients and channels that a program holds."""

MOST_BITS = constant(8)
"""Widest coefficient."""


@jit
def planes_kernel(
    planes_ptr: Pointer,
    width_ptr: Pointer,
    first_ptr: Pointer,
    step_ptr: Pointer,
    basis_ptr: Pointer,
    mean_ptr: Pointer,
    y_ptr: Pointer,
    T: Scalar,
    C: Scalar,
    R: Scalar,
    groups: Scalar,
    planes_batch: Scalar,
    SHARED: constexpr,
    BLOCK_T: constexpr,
    BLOCK_R: constexpr,
    BLOCK_C: constexpr,
) -> None:
    """BLOCK_T tokens and BLOCK_C of the C channels of one group, from R coefficients whose first planes are given."""
    group = tl.program_id(2) % groups
    batch = (tl.program_id(2) // groups).to(tl.int64)
    own = group if SHARED else batch * groups + group  # row of what was fitted
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = (T + 7) // 8
    sums = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, R, BLOCK_R):
        at = start + tl.arange(0, BLOCK_R)
        wide = tl.load(width_ptr + own * R + at, mask=at < R, other=0).to(tl.int32)  # [BLOCK_R]
        first = tl.load(first_ptr + own * R + at, mask=at < R, other=0)
        step = tl.load(step_ptr + own * R + at, mask=at < R, other=0.0).to(tl.float32)
        codes = tl.zeros((BLOCK_T, BLOCK_R), tl.int32)
        for bit in tl.static_range(MOST_BITS):
            place = batch * planes_batch + (first + bit)[None, :] * row + (token // 8)[:, None]
            mask = (token < T)[:, None] & (bit < wide)[None, :]
            packed = tl.load(planes_ptr + place, mask=mask, other=0).to(tl.int32)
            codes += ((packed >> (token % 8)[:, None]) & 1) << bit
        half = ((1 << wide).to(tl.float32) * 0.5)[None, :]
        values = (codes.to(tl.float32) + 0.5 - half) * step[None, :]  # [BLOCK_T, BLOCK_R]
        values = tl.where((wide > 0)[None, :], values, 0.0)
        mask = (at < R)[:, None] & (channel < C)[None, :]
        basis = tl.load(basis_ptr + own * C * R + channel[None, :] * R + at[:, None], mask=mask, other=0.0)
        sums = tl.dot(values, basis.to(tl.float32), sums, input_precision="tf32x3")  # [BLOCK_T, BLOCK_C]
    mean = tl.load(mean_ptr + own * C + channel, mask=channel < C, other=0.0).to(tl.float32)
    place = (batch * T + token)[:, None] * (groups * C) + group * C + channel[None, :]
    mask = (token < T)[:, None] & (channel < C)[None, :]
    tl.store(y_ptr + place, (sums + mean[None, :]).to(y_ptr.dtype.element_ty), mask=mask)


def dense(form: Planes, tensors: Mapping[str, Tensor], number: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A span's numbers [B, span, heads, head_dim], on the current device.

    Args:
        form: of the codec.
        tensors: by name, as the form names them, of all spans.
        number: of the span.
        shape: of the result, those four.
        like: a tensor of its dtype.
    """
    batch, span, heads, size = shape
    planes = tensors["planes"][:, number]
    planes = planes if planes[:1].is_contiguous() else planes.contiguous()
    width, step, basis, mean = (tensors[name].contiguous() for name in ("width", "step", "basis", "mean"))
    whole = width.int().flatten(-2)  # planes lie in the order of the coefficients of all groups
    first = (whole.cumsum(-1) - whole).int()
    y = like.new_empty(shape)
    channels, rank = heads * size // form.groups, basis.shape[-1]
    grid = (triton.cdiv(span, BLOCK_T), triton.cdiv(channels, BLOCK_C), batch * form.groups)
    planes_kernel[grid](
        planes,
        width,
        first,
        step,
        basis,
        mean,
        y,
        T=span,
        C=channels,
        R=rank,
        groups=form.groups,
        planes_batch=planes.stride(0),
        SHARED=form.shared,
        BLOCK_T=BLOCK_T,
        BLOCK_R=BLOCK_R,
        BLOCK_C=BLOCK_C,
        num_warps=8,
        num_stages=1,
    )
    return y
