"""RMSNorm over all heads and rotary embedding in one pass, in float32: between a query or key linear and attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.kernels import native
from fxq.kernels.arguments import RmsNormRope
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import declare
from fxq.kernels.quantize.op import FLOATS
from fxq.kernels.rope import triton as rope_triton


def _supports(a: RmsNormRope) -> str:
    x, weight, _, cos, sin, heads = a
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


def _fake(a: RmsNormRope) -> Tensor:
    batch, rows, width = a.x.shape
    return a.x.new_empty((batch, rows, a.heads, width // a.heads))


def _samples() -> Sequence[RmsNormRope]:
    random = torch.Generator().manual_seed(4)
    cases: list[RmsNormRope] = []
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
        cos, sin = (angle.cos(), angle.sin()) if rotate else (None, None)
        cases.append(RmsNormRope(x, weight, 1e-6, cos, sin, heads))
    return cases


@declare(RmsNormRope, fake=_fake, samples=_samples, supports=_supports, max_error=2**-6)
def rms_norm_rope(a: RmsNormRope) -> Tensor:
    """Root-mean-square norm over all channels, then rotation of neighbouring channel pairs of each head.

    A row whose squares overflow float32 is NaN, not zero.

    Returns:
        [B, S, heads, head_dim] in x's dtype, contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    x, weight, eps, cos, sin, heads = a
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
def rms_norm_rope_cpu(a: RmsNormRope) -> Tensor:
    """Native kernel, else the same operations in eager, whose sums must not depend on x's strides."""
    if a.x.dtype != torch.float16 and native.ready():
        return native.rms_norm_rope(a, _fake(a))
    return rms_norm_rope.compute(a._replace(x=a.x.contiguous()))


if HAS_TRITON:

    @rms_norm_rope.on("cuda", "triton")
    def rms_norm_rope_cuda(a: RmsNormRope) -> Tensor:
        """Launch on the device that holds x."""
        with torch.cuda.device(a.x.device):
            return rope_triton.launch(a)
