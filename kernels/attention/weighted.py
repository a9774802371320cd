"""Unmasked attention to pieces of keys and values, and to a few keys that each stand for many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.kernels.arguments import Attention, AttentionWeighted
from fxq.kernels.attention import op
from fxq.kernels.attention.merge import attention_lse, merge
from fxq.kernels.op import declare


def _supports(a: AttentionWeighted) -> str:
    if reason := op.supports(Attention(a.q, [*a.k, a.few_k], [*a.v, a.few_v])):
        return reason
    form = tuple(a.few_k.shape[:3])
    if a.weight.dtype != torch.float32 or tuple(a.weight.shape) != form:
        return f"weight is {a.weight.dtype} {tuple(a.weight.shape)}: expected float32 {form}"
    return ""


def _fake(a: AttentionWeighted) -> Tensor:
    batch, rows, heads, size = a.q.shape
    return a.q.new_empty((batch, rows, heads * size))


def _samples() -> Sequence[AttentionWeighted]:
    random = torch.Generator().manual_seed(8)
    cases: list[AttentionWeighted] = []
    for rows, lengths, few, dtype in (
        (6, (9,), 4, torch.float32),
        (5, (0, 5), 3, torch.bfloat16),
        (4, (3, 4), 0, torch.float32),
    ):

        def normal(length: int, *rest: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(2, length, *rest, generator=random, dtype=torch.float32).to(dtype)

        keys, values = ([normal(length, 2, 16) for length in lengths] for _ in range(2))
        weight = normal(few, 2, dtype=torch.float32).abs() * 5
        q, few_k, few_v = normal(rows, 2, 16), normal(few, 2, 16), normal(few, 2, 16)
        cases.append(AttentionWeighted(q, keys, values, few_k, few_v, weight))
    return cases


@declare(AttentionWeighted, fake=_fake, samples=_samples, supports=_supports, max_error=2**-6)
def attention_weighted(a: AttentionWeighted) -> Tensor:
    """As ``attention``, where each key of ``few_k`` counts as often as its weight says.

    Without such keys it is ``attention`` itself.

    Returns:
        [B, S, heads * head_dim] in q's dtype, contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    if not a.few_k.shape[1]:
        return op.attention.compute(Attention(a.q, a.k, a.v))
    found = attention_lse(a.q, a.few_k, a.few_v, a.weight.log())
    for k, v in zip(a.k, a.v, strict=True):
        found = merge(found, attention_lse(a.q, k, v))
    return found[0].to(a.q.dtype).flatten(2).contiguous()
