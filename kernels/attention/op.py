"""Unmasked attention to keys and values that lie in several pieces: a cache and the new tokens, never concatenated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.kernels import native
from fxq.kernels.arguments import Attention
from fxq.kernels.op import declare
from fxq.kernels.quantize.op import FLOATS


def supports(a: Attention) -> str:
    """The reason why arguments are not supported, or ""."""
    q, k, v = a
    if q.ndim != 4 or q.dtype not in FLOATS:
        return f"q is {q.dtype} {tuple(q.shape)}: expected float32, bfloat16 or float16 [B, S, heads, head_dim]"
    if not k or len(k) != len(v):
        return f"{len(k)} pieces of keys, {len(v)} of values: expected the same number, at least one"
    batch, _, heads, size = q.shape
    for i, (keys, values) in enumerate(zip(k, v, strict=True)):
        for name, piece in (("k", keys), ("v", values)):
            shape = tuple(piece.shape)
            if piece.dtype != q.dtype or piece.ndim != 4 or (shape[0], *shape[2:]) != (batch, heads, size):
                return f"{name}[{i}] is {piece.dtype} {shape}: expected {q.dtype} [{batch}, L, {heads}, {size}]"
        if keys.shape != values.shape:
            return f"k[{i}] is {tuple(keys.shape)}, v[{i}] {tuple(values.shape)}: expected the same shape"
    return ""


def _fake(a: Attention) -> Tensor:
    batch, rows, heads, size = a.q.shape
    return a.q.new_empty((batch, rows, heads * size))


def _samples() -> Sequence[Attention]:
    random = torch.Generator().manual_seed(5)
    cases: list[Attention] = []
    for rows, lengths, heads, size, dtype in (
        (6, (9,), 2, 16, torch.float32),
        (37, (150, 37), 2, 64, torch.bfloat16),
        (70, (0, 70), 1, 128, torch.bfloat16),
        (5, (513, 40, 5), 3, 80, torch.bfloat16),
    ):

        def normal(length: int, *rest: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(2, length, *rest, generator=random, dtype=torch.float32).to(dtype)

        keys = [normal(length, heads, size) for length in lengths]
        values = [normal(length, heads, size) for length in lengths]
        cases.append(Attention(normal(rows, heads, size), keys, values))
    return cases


@declare(Attention, fake=_fake, samples=_samples, supports=supports, max_error=2**-6)
def attention(a: Attention) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim)) v`` over the pieces of k and v in order, no mask.

    What is not finite in a query shows in its row, in a key or a value in all rows as in torch.softmax.

    Returns:
        [B, S, heads * head_dim] in q's dtype, contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    q, k, v = a
    keys, values = (torch.cat(list(pieces), dim=1).transpose(1, 2) for pieces in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)
    if q.is_cpu:
        out = _show_lost(out, q, keys, values)
    return out.flatten(2).contiguous()


def _show_lost(out: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``out`` [B, S, heads, head_dim] with what torch's CPU kernel takes for 0 where scores are not finite.

    A query that is not finite has no finite score; heads with such keys (keys and values [B, heads, L, head_dim]) are
    computed again by torch.softmax, 256 rows at a time.
    """
    lost = ~q.isfinite().all(-1, keepdim=True)
    if keys.shape[2] and bool(lost.any()):
        out = out.masked_fill(lost, torch.nan)
    for batch, head in (~keys.isfinite().flatten(2).all(-1)).nonzero().tolist():
        k, v = keys[batch, head].float(), values[batch, head].float()
        for rows, result in zip(q[batch, :, head].split(256), out[batch, :, head].split(256), strict=True):
            result.copy_((rows.float() @ k.T / k.shape[1] ** 0.5).softmax(-1) @ v)
    return out


@attention.on("cpu", native.or_else("sdpa", native.attends))
def attention_cpu(a: Attention) -> Tensor:
    """Native kernel for the dtypes that it is written for on this CPU, else scaled_dot_product_attention."""
    if native.attends(a.q.dtype):
        return native.attention(a, _fake(a))
    return attention.compute(a)
