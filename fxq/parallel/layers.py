"""One quantized layer on one rank: its outputs split (column) or its inputs (row).

The sum of all ranks' row shards is the whole layer: integers and scales are unchanged, and every rank's offset takes
the zero points' share of its own channels, so that large terms cancel before the sum.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import EllipsisType
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq import numerics
from fxq.core.ir import LayerPlan
from fxq.parallel.plan import ParallelError

Slices: TypeAlias = slice | EllipsisType | tuple[slice, ...]


class Sliceable(Protocol):
    """A tensor, or one in a file (``safetensors.safe_open(...).get_slice``): read where it is indexed by slices."""

    def __getitem__(self, index: Slices) -> Tensor:
        """The part of the tensor."""


@dataclasses.dataclass(frozen=True)
class LayerShard:
    """A rank's part of a layer, with the plan and tensors (docs/bundle.md) of a layer.

    ``filled`` stored channels of packed weights are zero and fill up blocks: they count as input channels of the plan,
    but the rank's input does not have them. ``x[..., perm]`` is in stored order nevertheless: they read channel 0.
    """

    plan: LayerPlan
    tensors: dict[str, Tensor]
    filled: int = 0


def bounds(total: int, rank: int, size: int, sizes: Sequence[int] | None, what: str) -> tuple[int, int]:
    """First and last (exclusive) of the ``total`` channels that belong to ``rank``, in equal parts or as ``sizes`` say.

    Raises:
        ParallelError: naming ``what`` when the parts do not fit.
    """
    if not 0 <= rank < size:
        raise ParallelError(f"{what}: rank {rank} of {size}, expected 0..{size - 1}")
    if sizes is None:
        if total % size:
            raise ParallelError(
                f"{what}: {total} channels cannot be split evenly over {size} ranks; use a number of ranks that "
                f"divides {total}, or replicate the layer"
            )
        return rank * (total // size), (rank + 1) * (total // size)
    if len(sizes) != size or sum(sizes) != total or min(sizes) < 1:
        raise ParallelError(f"{what}: sizes {list(sizes)}, expected {size} positive numbers with sum {total}")
    ends = [0, *accumulate(sizes)]
    return ends[rank], ends[rank + 1]


def shard_column(
    plan: LayerPlan, tensors: Mapping[str, Sliceable], rank: int, size: int, sizes: Sequence[int] | None = None
) -> LayerShard:
    """The rank's outputs of a quantized layer; the same integers and floats as in the whole layer.

    Args:
        plan: of the layer.
        tensors: the layer's tensors by name.
        rank: 0..size - 1.
        size: number of ranks.
        sizes: outputs of every rank, such as its heads times their width; equal parts by default.

    Raises:
        ParallelError: when the outputs cannot be split so.
    """
    low, high = bounds(plan.out_features, rank, size, sizes, f"layer {plan.layer}, outputs")
    parts: dict[str, Slices] = dict.fromkeys(("weight", "offset"), slice(low, high))
    parts["weight_scale"] = (slice(None), slice(low, high))
    # A copy: a view would keep the whole layer in memory.
    found = {name: tensor[parts.get(name, slice(None))] for name, tensor in tensors.items()}
    mine = {name: part.clone(memory_format=torch.contiguous_format) for name, part in found.items()}
    return LayerShard(dataclasses.replace(plan, out_features=high - low), mine)


def shard_row(
    plan: LayerPlan, tensors: Mapping[str, Sliceable], rank: int, size: int, sizes: Sequence[int] | None = None
) -> LayerShard:
    """The rank's inputs of a quantized layer: a contiguous slice of the model's channels, outliers among them.

    The sum of the ranks' float32 results is the layer's. The slice's channels are ordered ``[normal | outlier]`` again;
    with packed weights both groups are filled up with zero weights to whole blocks. A rank whose channels are all
    normal or all outliers has one group. Rank 0 has the bias. Where no input scales are stored (measured per token),
    each rank measures its own slice.

    Args:
        plan: of the layer.
        tensors: the layer's tensors by name; of the weight a rank but the first reads its own channels only.
        rank: 0..size - 1.
        size: number of ranks.
        sizes: inputs of every rank; equal parts by default.

    Raises:
        ParallelError: when the inputs cannot be split so.
    """
    low, high = bounds(plan.in_features, rank, size, sizes, f"layer {plan.layer}, inputs")
    weight = _Weight(tensors["weight"], plan)
    groups = weight.groups(low, high)
    offset = _offset(tensors, weight.after(high) if rank == 0 else groups, whole=rank == 0)
    if weight.packed:
        groups = _whole_blocks(groups, high - low)
    kept = [group.number for group in groups]
    mine = {name: tensors[name][:][kept] for name in _PER_GROUP if name in tensors}
    codes = torch.cat([group.codes for group in groups], dim=1)
    mine |= {"weight": numerics.pack_int4(codes) if weight.packed else codes, "offset": offset}
    order = torch.cat([group.channels for group in groups])
    filled = len(order) - (high - low)
    if filled or len(groups) == 2:
        mine["perm"] = order.where(order < high - low, 0).to(codes.device, torch.int32)
    outliers = tuple(groups[1].channels.tolist()) if len(groups) == 2 else ()
    return LayerShard(dataclasses.replace(plan, in_features=len(order), outliers=outliers), mine, filled)


_PER_GROUP = ("weight_scale", "input_scale", "input_zero_point")


@dataclasses.dataclass(frozen=True)
class _Group:
    """A rank's channels of scale group ``number``: int8 ``codes`` [N, k] and their local indices ``channels`` [k]."""

    number: int
    codes: Tensor
    channels: Tensor


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A stored weight, read by channels in stored order."""

    stored: Sliceable
    plan: LayerPlan

    @property
    def packed(self) -> bool:
        return self.plan.quantization.code_bits == 4

    def read(self, low: int, high: int) -> Tensor:
        """int8 [N, high - low]."""
        if not self.packed:
            return self.stored[:, low:high].clone(memory_format=torch.contiguous_format)
        block = numerics.PACK_BLOCK
        start, stop = low // block, -(-high // block)
        bytes_ = self.stored[:, start * block // 2 : stop * block // 2]
        return numerics.unpack_int4(bytes_)[:, low - start * block : high - start * block]

    def groups(self, low: int, high: int) -> list[_Group]:
        """The model's channels ``low`` to ``high``; a group without any is left out."""
        plan = self.plan
        first, last = (bisect.bisect_left(plan.outliers, end) for end in (low, high))
        outliers = torch.tensor(plan.outliers[first:last], dtype=torch.int64) - low
        normal = torch.ones(high - low, dtype=torch.bool)
        normal[outliers] = False
        spans = ((low - first, high - last), (plan.split + first, plan.split + last))
        channels = (normal.nonzero().flatten(), outliers)
        return [_Group(g, self.read(*spans[g]), channels[g]) for g in (0, 1) if len(channels[g])]

    def after(self, low: int) -> list[_Group]:
        """The model's channels from ``low`` on."""
        return self.groups(low, self.plan.in_features)


def _offset(tensors: Mapping[str, Sliceable], groups: Sequence[_Group], whole: bool) -> Tensor:
    """Constant float32 [N]: the zero points' share of ``groups``, or the ``whole`` constant without that share."""
    offset = tensors["offset"][:]
    offset = offset.clone() if whole else torch.zeros_like(offset)
    if "input_zero_point" not in tensors:
        return offset
    weight_scale, input_scale, zero_point = (tensors[name][:] for name in _PER_GROUP)
    for group in groups:
        at = slice(group.number, group.number + 1)
        scales = weight_scale[at], input_scale[at], -zero_point[at] if whole else zero_point[at]
        offset = numerics.fold_offset(offset, group.codes, *scales, group.codes.shape[1])
    return offset


def _whole_blocks(groups: Sequence[_Group], width: int) -> list[_Group]:
    """Groups filled up with zero weights; the new channels follow the ``width`` that the input has."""
    filled = []
    for group in groups:
        missing = -len(group.channels) % numerics.PACK_BLOCK
        channels = torch.cat((group.channels, torch.arange(width, width + missing)))
        filled.append(_Group(group.number, F.pad(group.codes, (0, missing)), channels))
        width += missing
    return filled
