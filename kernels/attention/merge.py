"""Attention in parts: each part's result with the logarithm of its weights' sum, and what joins two of them."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_SCORES = 2**22
"""Most scores of queries and keys that exist at a time."""


def attention_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``softmax(q k^T / sqrt(head_dim)) v`` and ``log(sum(exp(q k^T / sqrt(head_dim))))``, computed in float32.

    Args:
        q: float [B, S, heads, head_dim].
        k: float [B, L, heads, head_dim]; L may be 0.
        v: float [B, L, heads, any width].
        bias: float32 [B, L, heads], added to the scores of each key; minus infinity leaves it out.

    Returns:
        float32 [B, S, heads, width of v] and [B, S, heads, 1]; 0 and minus infinity where there is no key.
    """
    batch, rows, heads, width = q.shape
    if not k.shape[1]:
        none = q.new_zeros((batch, rows, heads, v.shape[3]), dtype=torch.float32)
        return none, none.new_full((batch, rows, heads, 1), -torch.inf)
    queries, keys, values = (x.float().transpose(1, 2) for x in (q, k, v))
    each = max(1, MOST_SCORES // max(1, batch * heads * k.shape[1]))
    parts = []
    for some in queries.split(each, dim=2):
        scores = some @ keys.transpose(-1, -2) * width**-0.5
        if bias is not None:
            scores += bias.transpose(1, 2).unsqueeze(2)
        lse = scores.logsumexp(-1, keepdim=True)
        # A bias may leave no key; without one, scores that are all minus infinity come from keys that are not finite.
        most = lse if bias is None else torch.where(lse == -torch.inf, 0.0, lse)
        parts.append((scores.sub_(most).exp_() @ values, lse))
    out, lse = (torch.cat(part, dim=2).transpose(1, 2) for part in zip(*parts, strict=True))
    return out, lse


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to the keys of two parts, from the results of :func:`attention_lse` for each, in the same form."""
    (a, lse_a), (b, lse_b) = first, second
    lse = torch.logaddexp(lse_a, lse_b)
    safe = torch.where(lse == -torch.inf, 0.0, lse)  # no key in either part
    return a * (lse_a - safe).exp() + b * (lse_b - safe).exp(), lse
