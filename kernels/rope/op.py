"""RMSNorm over all heads and rotary embedding in one pass, in float32: between a query or key linear and attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.kernels import native
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import Arguments, declare
from fxq.kernels.quantize.op import FLOATS
from fxq.kernels.rope import triton as rope_triton


def _supports(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, heads: int) -> str:
    if x.ndim != 3 or x.dtype not in FLOATS:
        return f"x is {x.dtype} {tuple(x.shape)}: expected float32, bfloat16 or float16 [B, S, heads * head_dim]"
    _, rows, width = x.shape
    if heads < 1 or width % heads or (width // heads) % 2:
        return f"heads = {heads}: expected a number that splits {width} channels into heads of even size"
    if weight is not None and (weight.dtype not in FLOATS or weight.shape != (width,)):
        return f"weight is {weight.dtype} {tuple(weight.shape)}: expected float ({width},) or None for no norm"
    if (cos is None) != (sin is None):
        return "cos and sin: expected both or none"
    for name, table in (("cos", cos), ("sin", sin)):
        wanted = (rows, width // heads // 2)
        if table is not None and (table.dtype != torch.float32 or table.shape != wanted):
            return f"{name} is {table.dtype} {tuple(table.shape)}: expected float32 {wanted} or None"
    return ""


def _fake(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, heads: int) -> Tensor:
    batch, rows, width = x.shape
    return x.new_empty((batch, rows, heads, width // heads))


def _samples() -> Sequence[Arguments]:
    random = torch.Generator().manual_seed(4)
    cases: list[Arguments] = []
    for shape, heads, norm, rotate, dtype in (
        ((1, 6, 96), 4, True, True, torch.float32),
        ((2, 10, 160), 2, True, True, torch.bfloat16),
        ((2, 7, 60), 3, False, True, torch.float32),
        ((1, 5, 64), 2, True, False, torch.bfloat16),
        ((2, 0, 64), 2, True, True, torch.float16),
    ):
        _, rows, width = shape
        angle = torch.rand(rows, width // heads // 2, generator=random, dtype=torch.float32) * 6
        x = torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
        weight = torch.randn(width, generator=random, dtype=torch.float32).to(dtype) if norm else None
        cases.append((x, weight, 1e-6, angle.cos() if rotate else None, angle.sin() if rotate else None, heads))
    return cases


@declare(
    "rms_norm_rope(Tensor x, Tensor? weight, float eps, Tensor? cos, Tensor? sin, int heads) -> Tensor",
    fake=_fake,
    samples=_samples,
    supports=_supports,
    max_error=2**-6,
)
def rms_norm_rope(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, heads: int
) -> Tensor:
    """Root-mean-square norm over all channels, then rotation of neighbouring channel pairs of each head.

    A row whose squares overflow float32 is NaN, not zero.

    Args:
        x: float32, bfloat16 or float16 [B, S, heads * head_dim].
        weight: float [heads * head_dim], the norm's scale, or None for no norm.
        eps: of the norm.
        cos: float32 [S, head_dim / 2], or None for no rotation.
        sin: as ``cos``.
        heads: number of heads.

    Returns:
        [B, S, heads, head_dim] in x's dtype, contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    h = x.float()
    if weight is not None:
        mean = h.pow(2).mean(-1, keepdim=True)
        h = h * torch.where(mean.isfinite(), torch.rsqrt(mean + eps), torch.nan) * weight.float()
    h = h.unflatten(-1, (heads, x.shape[-1] // heads))
    if cos is not None and sin is not None:
        pairs = h.unflatten(-1, (h.shape[-1] // 2, 2))
        even, odd = pairs[..., 0], pairs[..., 1]
        c, s = cos[:, None, :], sin[:, None, :]
        h = torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)
    return h.to(x.dtype).contiguous()


@rms_norm_rope.on("cpu", native.or_else("eager"))
def rms_norm_rope_cpu(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, heads: int
) -> Tensor:
    """Native kernel, else the same operations in eager, whose sums must not depend on x's strides."""
    if x.dtype != torch.float16 and native.ready():
        out = x.new_empty((*x.shape[:2], heads, x.shape[2] // heads))
        return native.rms_norm_rope(x, weight, eps, cos, sin, heads, out)
    return rms_norm_rope.reference(x.contiguous(), weight, eps, cos, sin, heads)


if HAS_TRITON:

    @rms_norm_rope.on("cuda", "triton")
    def rms_norm_rope_cuda(
        x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, heads: int
    ) -> Tensor:
        """Launch on the device that holds x."""
        with torch.cuda.device(x.device):
            return rope_triton.launch(x, weight, eps, cos, sin, heads)
