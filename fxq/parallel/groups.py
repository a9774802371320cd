"""Ranks and process groups, and the exchanges between ranks."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers the shape rules of the operators below
from torch import Tensor

from fxq.parallel.plan import ParallelError

_C10D = torch.ops._c10d_functional


@dataclasses.dataclass(frozen=True)
class Place:
    """A rank in a process group of ``size``; ``group`` is the group's name."""

    group: str
    rank: int
    size: int


def place_in(group: dist.ProcessGroup | None) -> Place:
    """Where this process is in a group, the default one if None.

    Raises:
        ParallelError: when torch.distributed is not initialized or the process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ParallelError(
            "there is no process group: start the processes with torchrun and call "
            "torch.distributed.init_process_group first"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ParallelError("this process is not in the group; call from the group's ranks only")
    chosen = dist.group.WORLD if group is None else group
    assert chosen is not None
    return Place(chosen.group_name, rank, dist.get_world_size(group))


def default_name() -> str:
    """Name of the default group; before it exists, the name torch gives to the first one."""
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return "0" if world is None else world.group_name


def all_to_all(x: Tensor, place: Place) -> Tensor:
    """``x`` [size, ...] with part i for rank i -> [size, ...] with part i from rank i."""
    counts = [1] * place.size
    out = _C10D.all_to_all_single(x.contiguous(), counts, counts, place.group)
    result: Tensor = _C10D.wait_tensor(out)
    return result


def all_gather(x: Tensor, place: Place) -> Tensor:
    """``x`` [B, S, ...] of every rank -> [B, size * S, ...], by rank."""
    out = _C10D.all_gather_into_tensor(x.movedim(1, 0).contiguous(), place.size, place.group)
    result: Tensor = _C10D.wait_tensor(out)
    return result.movedim(0, 1)
