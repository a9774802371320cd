"""Unmasked attention with scores of 8-bit integers, and weights and values of float8, for GPUs that multiply both.

Scores are those of :mod:`fxq.kernels.attention.eight_bits.int8`. The second product is that of SageAttention2 (arXiv
2411.10958) and of FlashAttention-3 in float8 (arXiv 2407.08608): values with a scale for every channel, weights with a
fixed one, sums of few tokens that are added up in float32, since Hopper's tensor cores keep about 14 bits of a sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.kernels import float8
from fxq.kernels.arguments import Attention
from fxq.kernels.attention.eight_bits import int8, triton_int8, triton_int8_fp8
from fxq.kernels.attention.triton import MOST_SIZE
from fxq.kernels.gemm.triton_fp8 import OLDEST
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import declare

KEY_BLOCK = triton_int8_fp8.KEYS
"""Tokens of a piece, at most, whose weights are relative to the largest of them, and are summed in one product: 64."""


def quantized_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """Float8 [B, heads, L, head_dim] and scales float32 [B, heads, 1, head_dim] of values [B, L, heads, head_dim].

    A channel that is not finite has the scale NaN, and zeros.
    """
    x = v.float().transpose(1, 2)
    scale = triton_int8_fp8.value_scale(v).unsqueeze(2)
    return torch.where(scale.isnan(), 0, float8.round_to(x.nan_to_num(0.0, 0.0, 0.0) * scale.reciprocal())), scale


def _samples() -> Sequence[Attention]:
    return int8.attention_int8.examples()


def _fake(a: Attention) -> Tensor:
    batch, rows, heads, size = a.q.shape
    return a.q.new_empty((batch, rows, heads * size))


def attended(a: Attention) -> Tensor:
    """What :func:`attention_int8_fp8` gives."""
    query = a.q.float()
    codes, scale = int8.quantized_rows(query)
    root = query.shape[3] ** 0.5
    rows = query.transpose(1, 2)
    most, total = scale.new_full(scale.shape, -torch.inf), scale * 0  # NaN of a query shows
    out = torch.zeros_like(rows)
    for k, v in zip(a.k, a.v, strict=True):
        if not k.shape[1]:
            continue
        mean = int8.key_mean(k)
        bias = rows @ mean.unsqueeze(-1) / root  # [B, heads, S, 1]
        keys, key_scale = int8.quantized_rows(k.float() - mean.unsqueeze(1))
        values, value_scale = quantized_values(v)
        blocks = (x.split(KEY_BLOCK, 2) for x in (keys, key_scale, values.float()))
        for key_codes, key_scales, value_codes in zip(*blocks, strict=True):
            scores = codes @ key_codes.transpose(2, 3) * (key_scales.transpose(2, 3) * (scale / root))
            top = scores.amax(-1, keepdim=True)
            weights = float8.round_to((scores - top).exp() * float8.LARGEST).float()
            found = top + bias
            above = torch.maximum(most, found)
            shrink, grow = (most - above).exp(), (found - above).exp()
            out = out * shrink + weights @ value_codes * (value_scale * grow)
            total = total * shrink + weights.sum(-1, keepdim=True) * grow
            most = above
    result = torch.where(total == 0, 0.0, out / total)
    return result.transpose(1, 2).flatten(2).to(a.q.dtype).contiguous()


@declare(Attention, fake=_fake, samples=_samples, supports=int8.supports, max_error=2**-4)
def attention_int8_fp8(a: Attention) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim)) v`` over the pieces of k and v in order, no mask, in int8 and float8.

    Scores and the means of keys are those of ``fxq::attention_int8``. In every block of KEY_BLOCK tokens of a piece the
    weights are ``P = e4m3(448 exp(score - largest))``, with the largest score of the block; values of a piece are
    ``e4m3(v / s_v)`` with ``s_v = max |v| / 448`` by channel, at least 2**-80. Rounding is half to even. ``sum(
    exp(largest) s_v (P . V)) / sum(exp(largest) sum(P))`` over the blocks is the result: what is not a product of
    integers or an e4m3 is float32.

    What is not finite in a query shows in its row, in a key in all rows, in a value in its channel of all rows. GPUs
    older than sm_89 run the kernel of ``fxq::attention_int8``, whose values are of 16 bits.

    Returns:
        [B, S, heads * head_dim] in q's dtype, contiguous; 0 where there is no key.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    return attended(a)


IN_16_BITS = "triton, values in 16 bits"
"""What runs on a GPU without float8 products."""


if HAS_TRITON:

    @attention_int8_fp8.on("cuda", "triton")
    def attention_int8_fp8_cuda(a: Attention) -> Tensor:
        """Launch on the device that holds q; heads that no tile holds take the reference, with a warning."""
        if a.q.shape[3] > MOST_SIZE:
            message = f"heads of {a.q.shape[3]} channels run the reference: the kernel takes {MOST_SIZE}"
            warnings.warn(f"fxq::attention_int8_fp8: {message}", stacklevel=2)
            return attention_int8_fp8.compute(a)
        means = torch.stack([int8.key_mean(k) for k in a.k])
        with torch.cuda.device(a.q.device):
            major, minor = torch.cuda.get_device_capability()
            if (major, minor) < OLDEST:
                return triton_int8.attend(a, means)
            return triton_int8_fp8.attend(a, means, 10 * major + minor)
