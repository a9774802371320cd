"""The weight layout of the native CPU kernels: panels of 64 outputs in the order the VNNI instructions read.

``int8 [ceil(N / 64), R, 64, 4]``: row r < R - 2 of a panel holds four consecutive input channels of its 64 outputs; the
segments ``[normal | outlier]`` are each padded with zeros to whole rows, and N to whole panels. The last two rows are
64 little-endian int32 each: ``128 * sum_k q_w`` of the normal and of the outlier segment, which the kernels for x86
subtract because they read activations as ``q + 128``; all use them for zero points of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq import numerics

PANEL = 64


def quads(channels: int) -> int:
    """Rows of four channels that hold a segment."""
    return -(-channels // 4)


def panel_shape(outputs: int, width: int, split: int) -> tuple[int, int, int, int]:
    """Shape of the panels of an int8 [outputs, width] weight."""
    return -(-outputs // PANEL), quads(split) + quads(width - split) + 2, PANEL, 4


def pack_panels(weight: Tensor, split: int) -> Tensor:
    """Panels of an int8 [N, K] weight; see the module's docstring."""
    outputs, width = weight.shape
    count, rows, _, _ = panel_shape(outputs, width, split)
    panels = torch.zeros(count, rows, PANEL, 4, dtype=torch.int8, device=weight.device)
    sums = torch.zeros(2, count * PANEL, dtype=torch.int32, device=weight.device)
    start = 0
    for g, part in enumerate(numerics.group_slices(width, split)):
        segment = weight[:, part]
        length = quads(segment.shape[1])
        padded = torch.zeros(count * PANEL, 4 * length, dtype=torch.int8, device=weight.device)
        padded[:outputs, : segment.shape[1]] = segment
        panels[:, start : start + length] = padded.reshape(count, PANEL, length, 4).transpose(1, 2)
        sums[g, :outputs] = 128 * segment.sum(dim=1, dtype=torch.int32)
        start += length
    panels[:, start:] = sums.reshape(2, count, PANEL, 1).transpose(0, 1).contiguous().view(torch.int8)
    return panels


def unpack_panels(panels: Tensor, outputs: int, width: int, split: int) -> Tensor:
    """int8 [outputs, width] of panels; inverse of :func:`pack_panels`."""
    parts, start = [], 0
    for part in numerics.group_slices(width, split):
        channels = part.stop - part.start
        length = quads(channels)
        segment = panels[:, start : start + length].transpose(1, 2).reshape(-1, 4 * length)
        parts.append(segment[:outputs, :channels])
        start += length
    return torch.cat(parts, dim=1)
