"""Unmasked attention whose products are of 8-bit integers, to keys and values that lie in several pieces.

The scheme of SageAttention (arXiv 2410.02367): a scale for every token of queries and keys, from which the mean of the
keys is taken off, one for every channel of values, and weights of 16 bits. Each piece is quantized by itself, so a
piece that does not change has the same integers in every call.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels import native
from fxq.kernels.arguments import Attention
from fxq.kernels.attention import op
from fxq.kernels.attention.eight_bits import triton_int8
from fxq.kernels.attention.triton import MOST_SIZE
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import declare

BITS = 8
MOST_WEIGHT = 2**15 - 1
"""Integer of a weight as large as the largest one of its block.

With 8 bits the many small weights of a long cache, which together matter, would be 0.
"""

VALUE_BLOCK = 256
"""Tokens of a piece, at most, whose values share the scales of channels, and whose weights are relative to one."""

MOST_HEAD_DIM = 2**24 // 127**2
"""Channels of a head whose products of integers add up exactly in float32: 1040."""


def key_mean(k: Tensor) -> Tensor:
    """Mean over the tokens of a piece [B, L, heads, head_dim], float32 [B, heads, head_dim]; 0 of none.

    The softmax is the same without it where one mean is taken off all keys; of several pieces each has its own, and the
    product of a query with it is added to the scores of the piece.
    """
    if not k.shape[1]:
        return k.new_zeros((k.shape[0], *k.shape[2:]), dtype=torch.float32)
    return torch.mean(k, dim=1, dtype=torch.float32)


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, heads, L, head_dim] of -127..127 and scales [B, heads, L, 1] of float32 [B, L, heads, head_dim].

    Both are float32; a row that is not finite has the scale NaN.
    """
    codes, scale = numerics.quantize_per_token(x.transpose(1, 2), x.shape[3], BITS)
    return codes.float(), scale


def quantized_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, heads, L, head_dim] and scales [B, heads, 1, head_dim] of a block of values [B, L, heads, head_dim]."""
    codes, scale = numerics.quantize_per_token(v.float().permute(0, 2, 3, 1), v.shape[1], BITS)
    return codes.float().transpose(2, 3), scale.transpose(2, 3)


class Block(NamedTuple):
    """Up to VALUE_BLOCK tokens of a piece in integers; all float32.

    Attributes:
        key_codes: [B, heads, L, head_dim] of -127..127, of keys less the mean of their piece.
        key_scale: [B, heads, L, 1].
        value_codes: as ``key_codes``.
        value_scale: [B, heads, 1, head_dim].
    """

    key_codes: Tensor
    key_scale: Tensor
    value_codes: Tensor
    value_scale: Tensor


class Piece(NamedTuple):
    """Keys and values in integers: the mean of the keys float32 [B, heads, head_dim], and blocks."""

    mean: Tensor
    blocks: Sequence[Block]


def quantized(k: Tensor, v: Tensor) -> Piece:
    """A piece of keys and of values [B, L, heads, head_dim]."""
    mean, blocks = key_mean(k), []
    for keys, values in zip(k.split(VALUE_BLOCK, 1), v.split(VALUE_BLOCK, 1), strict=True):
        if keys.shape[1]:
            blocks.append(Block(*quantized_rows(keys.float() - mean.unsqueeze(1)), *quantized_values(values)))
    return Piece(mean, blocks)


def attended(query: Tensor, pieces: Iterable[Piece]) -> Tensor:
    """What :func:`attention_int8` gives of queries [B, S, heads, head_dim] over pieces in integers."""
    q = query.float()
    codes, scale = quantized_rows(q)
    root = q.shape[3] ** 0.5
    rows = q.transpose(1, 2)
    most, total = scale.new_full(scale.shape, -torch.inf), scale * 0  # NaN of a query shows
    out = torch.zeros_like(rows)
    for piece in pieces:
        bias = rows @ piece.mean.unsqueeze(-1) / root  # [B, heads, S, 1]
        for block in piece.blocks:
            scores = codes @ block.key_codes.transpose(2, 3) * (block.key_scale.transpose(2, 3) * (scale / root))
            top = scores.amax(-1, keepdim=True)
            weights = ((scores - top).exp() * MOST_WEIGHT).round()
            found = top + bias
            above = torch.maximum(most, found)
            shrink, grow = (most - above).exp(), (found - above).exp()
            sums = (weights.double() @ block.value_codes.double()).float()
            out = out * shrink + sums * (block.value_scale * grow)
            total = total * shrink + weights.sum(-1, keepdim=True) * grow
            most = above
    result = torch.where(total == 0, 0.0, out / total)
    return result.transpose(1, 2).flatten(2).to(query.dtype).contiguous()


def supports(a: Attention) -> str:
    """The reason why arguments are not supported, or ""."""
    if reason := op.supports(a):
        return reason
    if a.q.shape[3] > MOST_HEAD_DIM:
        return f"heads of {a.q.shape[3]} channels: expected at most {MOST_HEAD_DIM}, whose integers add up exactly"
    return ""


def _fake(a: Attention) -> Tensor:
    batch, rows, heads, size = a.q.shape
    return a.q.new_empty((batch, rows, heads * size))


def _samples() -> Sequence[Attention]:
    random = torch.Generator().manual_seed(9)
    cases: list[Attention] = []
    for rows, lengths, heads, size, dtype in (
        (6, (9,), 2, 16, torch.float32),
        (37, (150, 37), 2, 64, torch.bfloat16),
        (70, (0, 70), 1, 128, torch.float16),
        (5, (513, 40, 5), 3, 80, torch.float32),
    ):

        def normal(length: int, *rest: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(2, length, *rest, generator=random, dtype=torch.float32).to(dtype)

        shift = 3 * normal(1, heads, size)
        keys = [normal(length, heads, size) + shift for length in lengths]
        values = [normal(length, heads, size) for length in lengths]
        cases.append(Attention(normal(rows, heads, size), keys, values))
    return cases


@declare(Attention, fake=_fake, samples=_samples, supports=supports, max_error=2**-5)
def attention_int8(a: Attention) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim)) v`` over the pieces of k and v in order, no mask, in 8-bit integers.

    With q = s_q Q and k - mean = s_k K a score is ``(s_q / sqrt(head_dim)) s_k (Q . K) + q . mean / sqrt(head_dim)``.
    In every block of VALUE_BLOCK tokens the weights are ``W = round(32767 exp(score - largest))``, with the largest
    score of the block, and v = s_v V by channel; ``sum(exp(largest) s_v (W . V)) / sum(exp(largest) sum(W))`` over the
    blocks is the result. Products of integers are exact, everything else is float32.

    What is not finite in a query shows in its row, in a key in all rows, in a value in its channel of all rows.

    Returns:
        [B, S, heads * head_dim] in q's dtype, contiguous; 0 where there is no key.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    return attended(a.q, [quantized(k, v) for k, v in zip(a.k, a.v, strict=True)])


@attention_int8.on("cpu", native.or_else("reference"))
def attention_int8_cpu(a: Attention) -> Tensor:
    """Native kernel, in float32 for float16; else the reference."""
    if not native.ready():
        return attention_int8.compute(a)
    means = torch.stack([key_mean(k) for k in a.k])
    if a.q.dtype != torch.float16:
        return native.attention_int8(a, means, _fake(a))
    wide = Attention(a.q.float(), [k.float() for k in a.k], [v.float() for v in a.v])
    return native.attention_int8(wide, means, _fake(wide)).to(a.q.dtype)


if HAS_TRITON:

    @attention_int8.on("cuda", "triton")
    def attention_int8_cuda(a: Attention) -> Tensor:
        """Launch on the device that holds q; heads that no tile holds take the reference, with a warning."""
        if a.q.shape[3] > MOST_SIZE:
            message = f"heads of {a.q.shape[3]} channels run the reference: the kernel takes {MOST_SIZE}"
            warnings.warn(f"fxq::attention_int8: {message}", stacklevel=2)
            return attention_int8.compute(a)
        with torch.cuda.device(a.q.device):
            return triton_int8.attend(a, torch.stack([key_mean(k) for k in a.k]))
