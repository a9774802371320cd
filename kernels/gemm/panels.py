"""The weight layout of the native CPU kernels: panels of 64 outputs in the order the VNNI instructions read.

``int8 [ceil(N / 64), R, 64, 4]``: row r < R - 2 of a panel holds four consecutive input channels of its 64 outputs; the
segments ``[normal | outlier]`` are each padded with zeros to whole rows, and N to whole panels. The last two rows are
64 little-endian int32 each: ``128 * sum_k q_w`` of the normal and of the outlier segment, which the kernels for x86
subtract because they read activations as ``q + 128``; all use them for zero points of rows.

Of weights of up to 4 bits panels are ``uint8``, with two such rows in one: the first in the low halves of its bytes,
the second in the high ones, both as ``q_w + 8``. Segments are padded to whole pairs of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq import numerics

PANEL = 64
MOST_PACKED_BITS = 4
"""Of a weight whose panels hold two channels in a byte."""


def _channels_of_row(packed: bool) -> int:
    return 8 if packed else 4


def _rows(channels: int, packed: bool) -> int:
    """Of a panel, that hold a segment."""
    return -(-channels // _channels_of_row(packed))


def panel_shape(outputs: int, width: int, split: int, packed: bool = False) -> tuple[int, int, int, int]:
    """Shape of the panels of an [outputs, width] weight."""
    return -(-outputs // PANEL), _rows(split, packed) + _rows(width - split, packed) + 2, PANEL, 4


def pack_panels(weight: Tensor, split: int, bits: int = 8) -> Tensor:
    """Panels of an int8 [N, K] weight; see the module's docstring.

    Args:
        weight: integers of ``bits`` bits.
        split: number of normal channels.
        bits: up to MOST_PACKED_BITS the panels are uint8.
    """
    outputs, width = weight.shape
    packed = bits <= MOST_PACKED_BITS
    count, rows, _, _ = panel_shape(outputs, width, split, packed)
    each = _channels_of_row(packed)
    panels = torch.zeros(count, rows, PANEL, 4, dtype=torch.uint8, device=weight.device)
    sums = torch.zeros(2, count * PANEL, dtype=torch.int32, device=weight.device)
    start = 0
    for g, part in enumerate(numerics.group_slices(width, split)):
        segment = weight[:, part]
        length = _rows(segment.shape[1], packed)
        padded = torch.zeros(count * PANEL, each * length, dtype=torch.int8, device=weight.device)
        padded[:outputs, : segment.shape[1]] = segment
        quads = padded.reshape(count, PANEL, length, -1, 4).permute(0, 2, 3, 1, 4)
        if packed:
            low, high = (quads + 8).view(torch.uint8).unbind(2)
            panels[:, start : start + length] = low | high << 4
        else:
            panels[:, start : start + length] = quads.squeeze(2).view(torch.uint8)
        sums[g, :outputs] = 128 * segment.sum(dim=1, dtype=torch.int32)
        start += length
    panels[:, start:] = sums.reshape(2, count, PANEL, 1).transpose(0, 1).contiguous().view(torch.uint8)
    return panels if packed else panels.view(torch.int8)


def unpack_panels(panels: Tensor, outputs: int, width: int, split: int) -> Tensor:
    """int8 [outputs, width] of panels; inverse of :func:`pack_panels`."""
    packed = panels.dtype == torch.uint8
    parts, start = [], 0
    for part in numerics.group_slices(width, split):
        channels = part.stop - part.start
        length = _rows(channels, packed)
        segment = panels[:, start : start + length]
        if packed:
            segment = torch.stack([segment & 15, segment >> 4], 2).view(torch.int8) - 8
        quads = segment.reshape(segment.shape[0], -1, PANEL, 4).transpose(1, 2)
        parts.append(quads.reshape(-1, _channels_of_row(packed) * length)[:outputs, :channels])
        start += length
    return torch.cat(parts, dim=1)
