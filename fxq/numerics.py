"""The reference numerics: every kernel, lowering and file format agrees with this file.

Pure tensor math in float32 and int32. Conventions:

* A linear's input channels are ordered ``[normal | outlier]``; ``split`` counts the normal ones (``split == K``: one
  scale). Group 0 is the normal part, group 1 the outlier part; G is 1 or 2.
* Activations are static per tensor and asymmetric: ``q = clip(round(x * (1 / scale[g])) + zero_point[g], qmin, qmax)``,
  round half to even, stored in int8 whatever the bit width.
* Weights are symmetric per output channel: ``q = clip(round(w / scale[g, n]), qmin, qmax)``, int8 or packed int4.
* Or their scale is measured per token, symmetric: ``scale[r, g] = max_k |x[r, k]| / qmax`` over the group's channels (1
  where the row is zero there) and ``q = round(x * (1 / scale[r, g]))``, which stays in ``-qmax..qmax``. Below,
  ``input_scale[g]`` is then ``scale[r, g]``, there are no zero points and the offset is the bias.
* Or with a zero point per token, asymmetric: ``scale[r, g] = (top - least) / (2^bits - 1)`` of what a row spans with 0,
  and ``least`` is the least integer. The product is of ``q_x - zero_point[r, g]``, exact in int32.
* ``y = sum_g input_scale[g] * weight_scale[g, n] * sum_k q_x q_w + offset[n]`` where the offset holds the bias and the
  zero points: ``offset[n] = bias[n] - sum_g input_scale[g] weight_scale[g, n] zero_point[g] sum_k q_w``.
* What is not finite stays visible. Integers have no NaN, so a row of a static quantization that holds NaN or infinity
  begins with the codes of :data:`POISON`, and a product makes such a row NaN. With scales per token the row's own scale
  is NaN. Rows of fewer than ``POISON_LEAST`` channels are not marked: :func:`unfit_width` keeps such layers in float.

Equations follow Q-ARVD (arXiv 2605.21072); its asymmetric weights would need a row sum of activations at run
time, so weights are symmetric here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_MAGNITUDE = 127 * 2.0**-126
"""A row of a group counts as zero up to it (1.5e-36): its scale would not be a normal float32."""

LEAST_HALF_RANGE = 2.0**-119
"""As ``LEAST_MAGNITUDE``, half of the range that a row with a zero point of its own spans."""

PACK_BLOCK = 32
"""Channels per packing block of int4 weights; every group's width is a multiple of it."""

POISON = 0xB1E94D36
"""Mark of a row that is not finite: its channel j < 32 is 127 where bit j is set, else -128.

With fewer than 8 bits no finite row holds such codes. With 8 bits one does if its first 32 channels are clipped in just
this pattern, which random signs do once in 2**32 rows (2**16 for 16 channels)."""

POISON_WIDTH = 32
"""Channels of the mark; a narrower row holds as many of them as it has channels."""

POISON_LEAST = 16
"""Rows of fewer channels are not marked."""

MAX_WIDTH = 2**17 - 1
"""Most input channels of an integer product: a product of int8 is at most 2**14 and the sum is an int32."""

MAX_WIDTH_ASYMMETRIC = 2**16
"""As ``MAX_WIDTH`` where zero points are taken off before the product is scaled: it is then at most 255 * 128."""


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest value of a signed ``bits``-bit integer, 2 <= bits <= 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits = {bits}: expected 2..8")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def group_slices(width: int, split: int) -> tuple[slice, ...]:
    """Channel slices of the groups, normal first; one slice when ``split == width``.

    Raises:
        ValueError: when ``split`` is not in 1..width.
    """
    if not 0 < split <= width:
        raise ValueError(f"split = {split}: expected 1..{width}")
    return (slice(0, width),) if split == width else (slice(0, split), slice(split, width))


def unfit_width(width: int, per_token: bool = False, asymmetric: bool = False) -> str:
    """Why a layer of ``width`` input channels cannot be multiplied in integers, or "".

    Args:
        width: input channels.
        per_token: whether scales are measured per token; they hold what is not finite for any width.
        asymmetric: whether zero points are measured with them.
    """
    if width > (most := MAX_WIDTH_ASYMMETRIC if asymmetric else MAX_WIDTH):
        return f"{width} input channels can overflow the int32 sum of a product: at most {most} fit"
    if width < POISON_LEAST and not per_token:
        return f"fewer than {POISON_LEAST} input channels: its integers cannot show what is not finite"
    return ""


def poison_codes(width: int, device: torch.device | str = "cpu") -> Tensor:
    """int8 [min(width, 32)], what a row of ``width`` channels that is not finite begins with."""
    bit = torch.bitwise_right_shift(POISON, torch.arange(min(width, POISON_WIDTH), device=device)) & 1
    return (bit * 255 - 128).to(torch.int8)


def poison(q: Tensor, rows: Tensor) -> Tensor:
    """Mark rows as not finite.

    Args:
        q: int8 [..., K].
        rows: bool [...], the rows to be marked.

    Returns:
        int8 [..., K]; ``q`` itself when K is less than ``POISON_LEAST``.
    """
    if q.shape[-1] < POISON_LEAST:
        return q
    codes = poison_codes(q.shape[-1], q.device)
    head = torch.where(rows.unsqueeze(-1), codes, q[..., : len(codes)])
    return torch.cat((head, q[..., len(codes) :]), dim=-1)


def poisoned(q: Tensor) -> Tensor:
    """The rows of integers [..., K] that :func:`poison` marked, bool [...]."""
    if q.shape[-1] < POISON_LEAST:
        return torch.zeros(q.shape[:-1], dtype=torch.bool, device=q.device)
    codes = poison_codes(q.shape[-1], q.device)
    return (q[..., : len(codes)] == codes).all(-1)


def quantize_input(x: Tensor, scale: Tensor, zero_point: Tensor, split: int, bits: int) -> Tensor:
    """Quantize activations whose channels are already in ``[normal | outlier]`` order.

    Args:
        x: float [..., K].
        scale: float32 [G].
        zero_point: int32 [G].
        split: number of normal channels.
        bits: 2..8.

    Returns:
        int8 [..., K]. A row with NaN or infinity is marked by :func:`poison`, as every row where the reciprocal of a
        scale is not finite; elsewhere in it infinities are clipped and NaN becomes the least integer.
    """
    low, high = integer_range(bits)
    values, inverse, parts = x.float(), scale.reciprocal(), []
    for g, part in enumerate(group_slices(x.shape[-1], split)):
        scaled = values[..., part] * inverse[g]
        z = zero_point[g]
        clipped = torch.where(scaled.isnan(), low - z, scaled.clamp(low - z, high - z))
        parts.append((clipped.round() + z).to(torch.int8))
    q = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return poison(q, ~(values.isfinite().all(-1) & inverse.isfinite().all()))


def dequantize_input(q: Tensor, scale: Tensor, zero_point: Tensor, split: int) -> Tensor:
    """float32 [..., K] of int8 activations; inverse of :func:`quantize_input` up to rounding and clipping.

    Rows marked as not finite are NaN.
    """
    parts = [
        (q[..., part].float() - zero_point[g]) * scale[g] for g, part in enumerate(group_slices(q.shape[-1], split))
    ]
    return torch.cat(parts, dim=-1).masked_fill(poisoned(q).unsqueeze(-1), torch.nan)


def quantize_weight(weight: Tensor, scale: Tensor, split: int, bits: int) -> Tensor:
    """Round-to-nearest integers int8 [N, K] of a float weight in ``[normal | outlier]`` order; ``scale`` [G, N]."""
    low, high = integer_range(bits)
    parts = [
        (weight[:, part].float() / scale[g].unsqueeze(1)).round().clamp(low, high).to(torch.int8)
        for g, part in enumerate(group_slices(weight.shape[1], split))
    ]
    return torch.cat(parts, dim=1)


def dequantize_weight(q: Tensor, scale: Tensor, split: int) -> Tensor:
    """float32 [N, K] of int8 weights with ``scale`` [G, N]."""
    parts = [q[:, part].float() * scale[g].unsqueeze(1) for g, part in enumerate(group_slices(q.shape[1], split))]
    return torch.cat(parts, dim=1)


def pack_int4(q: Tensor) -> Tensor:
    """Pack int8 values in -8..7, [N, K] with K a multiple of 32, into uint8 [N, K / 2].

    In each block of 32 channels, byte j holds channel j in its low nibble and channel j + 16 in its high nibble,
    both in two's complement.

    Raises:
        ValueError: when K is not a multiple of 32 or a value does not fit.
    """
    if q.ndim != 2 or q.shape[1] % PACK_BLOCK:
        raise ValueError(f"int4 packing needs [N, K] with K a multiple of {PACK_BLOCK}, got {tuple(q.shape)}")
    if q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise ValueError(f"int4 packing needs values in -8..7, got {int(q.min())}..{int(q.max())}")
    halves = q.reshape(q.shape[0], q.shape[1] // PACK_BLOCK, 2, PACK_BLOCK // 2).to(torch.int32) & 15
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).to(torch.uint8).flatten(1)


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 [N, K] of uint8 [N, K / 2]; inverse of :func:`pack_int4`."""
    blocks = packed.reshape(packed.shape[0], packed.shape[1] * 2 // PACK_BLOCK, PACK_BLOCK // 2).to(torch.int8)
    low = (blocks << 4) >> 4
    high = blocks >> 4
    return torch.stack((low, high), dim=2).flatten(1)


def unpacked(stored: Tensor, bits: int) -> Tensor:
    """int8 [N, K] of a stored weight: int8 [N, K], or packed uint8 [N, K / 2] where it has at most 4 bits."""
    return unpack_int4(stored) if bits <= 4 else stored


def unfolded_bias(
    offset: Tensor, q: Tensor, weight_scale: Tensor, input_scale: Tensor, zero_point: Tensor, split: int
) -> Tensor:
    """The bias float64 [N] in an offset of :func:`fold_offset`, up to the offset's rounding."""
    return offset.double() - fold_offset(None, q, weight_scale, input_scale, zero_point, split).double()


def fold_offset(
    bias: Tensor | None, q: Tensor, weight_scale: Tensor, input_scale: Tensor, zero_point: Tensor, split: int
) -> Tensor:
    """Per-output constant float32 [N]: the bias less the zero points' share of the product.

    Args:
        bias: float [N] or None.
        q: int8 [N, K] weights, unpacked.
        weight_scale: float32 [G, N].
        input_scale: float32 [G].
        zero_point: int32 [G].
        split: number of normal channels.
    """
    offset = torch.zeros(q.shape[0], dtype=torch.float64, device=q.device)
    if bias is not None:
        offset += bias.double()
    for g, part in enumerate(group_slices(q.shape[1], split)):
        sums = q[:, part].sum(dim=1, dtype=torch.int64).double()
        offset -= input_scale[g].double() * weight_scale[g].double() * zero_point[g].double() * sums
    return offset.float()


def ratio_limit(width: int, split: int) -> float:
    """Largest safe ratio of a layer's outlier scale to its normal scale.

    GPU kernels finish the outlier sum first, multiply the int32 accumulator by
    ``ratio = input_scale[1] weight_scale[1, n] / (input_scale[0] weight_scale[0, n])`` and go on with the normal sum
    in it; ``2^14 (split + ratio (width - split)) < 2^31`` keeps that in range.

    Args:
        width: input channels K.
        split: normal channels, less than ``width``.
    """
    return (2**17 - 1 - split) / (width - split)


def dual_scale_matmul(
    q_x: Tensor, q_w: Tensor, weight_scale: Tensor, input_scale: Tensor, offset: Tensor, split: int
) -> Tensor:
    """``y`` float32 [..., N] of int8 activations [..., K] and int8 weights [N, K], accumulated exactly in int32.

    Rows of ``q_x`` marked as not finite are NaN. K is at most ``MAX_WIDTH``.
    """
    flat = q_x.reshape(-1, q_x.shape[-1])
    y = offset.expand(flat.shape[0], -1)
    for g, part in enumerate(group_slices(q_x.shape[-1], split)):
        accumulator = flat[:, part].to(torch.int32) @ q_w[:, part].to(torch.int32).T
        y = y + accumulator.float() * (input_scale[g] * weight_scale[g])
    y = y.masked_fill(poisoned(flat).unsqueeze(-1), torch.nan)
    return y.reshape(*q_x.shape[:-1], q_w.shape[0])


def quantize_per_token(x: Tensor, split: int, bits: int, asymmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize activations, channels already in ``[normal | outlier]`` order, with a scale per token and group.

    Args:
        x: float [..., K].
        split: number of normal channels.
        bits: 2..8.
        asymmetric: whether every token and group has a zero point too.

    Returns:
        int8 [..., K] and the scales float32 [..., G]; asymmetric ones [..., 2 G], behind the scales the zero points,
        whole numbers. A row's group with NaN or infinity has the scale NaN, integers and zero point are 0.
    """
    low, high = integer_range(bits)
    parts, scales, zeros = [], [], []
    for part in group_slices(x.shape[-1], split):
        values = x[..., part].float()
        if asymmetric:
            scale, zero = token_range(values.amin(-1, keepdim=True), values.amax(-1, keepdim=True), bits)
            zeros.append(zero)
        else:
            scale, low = token_scale(values.abs().amax(-1, keepdim=True), high), -high
            zero = scale.new_zeros(())
        scaled = (values * scale.reciprocal()).clamp(low - zero, high - zero).round() + zero
        parts.append(torch.where(scale.isnan(), 0.0, scaled).to(torch.int8))
        scales.append(scale)
    return torch.cat(parts, dim=-1), torch.cat(scales + zeros, dim=-1)


def token_scale(top: Tensor, high: int) -> Tensor:
    """Scale of rows whose largest magnitude is ``top``: 1 where it counts as zero, NaN where it is not finite."""
    # By a tensor: CUDA makes of a division by a number a product with its reciprocal.
    scale = torch.where(top <= LEAST_MAGNITUDE, 1.0, top / torch.full_like(top, high))
    return torch.where(top.isfinite(), scale, torch.nan)


def token_range(least: Tensor, top: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale, as :func:`token_scale`, and zero point, of rows from ``least`` to ``top``; 0 of rows of nothing or NaN."""
    low, high = integer_range(bits)
    least = least.clamp(max=0.0)
    half = top.clamp(min=0.0) * 0.5 - least * 0.5  # the whole may be more than float32 holds
    spans = (half > LEAST_HALF_RANGE) & half.isfinite()
    scale = torch.where(spans, half / torch.full_like(half, (high - low) / 2), 1.0)
    zero = torch.where(spans, low - (least * scale.reciprocal()).round(), 0.0)
    return torch.where(half.isfinite(), scale, torch.nan), zero


def split_scale(scale: Tensor, width: int, split: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points, both [..., G], of what :func:`quantize_per_token` gives: zeros for symmetric scales."""
    groups = len(group_slices(width, split))
    scales, zeros = scale[..., :groups], scale[..., groups:]
    return scales, zeros if zeros.shape[-1] else torch.zeros_like(scales)


def dequantize_per_token(q: Tensor, scale: Tensor, split: int) -> Tensor:
    """float32 [..., K] of int8 activations with ``scale`` [..., G or 2 G]; inverse of :func:`quantize_per_token`."""
    scales, zeros = (part.unsqueeze(-1) for part in split_scale(scale, q.shape[-1], split))
    parts = group_slices(q.shape[-1], split)
    return torch.cat([(q[..., p].float() - zeros[..., g, :]) * scales[..., g, :] for g, p in enumerate(parts)], dim=-1)


def per_token_matmul(
    q_x: Tensor, scale: Tensor, q_w: Tensor, weight_scale: Tensor, offset: Tensor, split: int
) -> Tensor:
    """As :func:`dual_scale_matmul` with scales float32 [..., G or 2 G] of their own for every row of ``q_x``."""
    flat = q_x.reshape(-1, q_x.shape[-1])
    scales, zeros = split_scale(scale.reshape(-1, scale.shape[-1]), q_x.shape[-1], split)
    y = offset.expand(flat.shape[0], -1)
    for g, part in enumerate(group_slices(q_x.shape[-1], split)):
        accumulator = flat[:, part].to(torch.int32) @ q_w[:, part].to(torch.int32).T
        accumulator -= zeros[:, g, None].to(torch.int32) * q_w[:, part].sum(1, dtype=torch.int32)
        y = y + accumulator.float() * weight_scale[g] * scales[:, g, None]
    return y.reshape(*q_x.shape[:-1], q_w.shape[0])


def energy(tensor: Tensor) -> float:
    """Sum of squares in float64."""
    return float(tensor.double().square().sum())


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two energies: infinite without noise, minus infinity without signal."""
    if noise == 0.0:
        return math.inf
    ratio = signal / noise  # 0 where the noise is infinite
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf if ratio == 0 else math.nan
