"""One job on several processes: who does what, and how they tell each other (torch.distributed, gloo or nccl)."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_LONGEST_STEP = datetime.timedelta(days=1)
_DTYPES = {str(d): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)}
_DTYPES |= {str(d): d for d in (torch.int16, torch.int8, torch.uint8, torch.bool)}


class WorkerError(RuntimeError):
    """A rank of the job failed or was lost; the job cannot go on."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """The ranks that share a job; ``Workers()`` is one process alone.

    Every rank makes the same calls in the same order. Work is split by position, so that the result does not depend on
    the number of ranks. ``part`` is a process group other than the default one.
    """

    rank: int = 0
    size: int = 1
    part: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Workers:
        """The ranks of a process group; None: this process alone."""
        if group is None:
            return cls()
        # A reference to the default group would outlive its end and abort the process then.
        part = None if group is dist.group.WORLD else group
        return cls(dist.get_rank(group), dist.get_world_size(group), part)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group, None for one process alone."""
        return None if self.size == 1 else self.part or dist.group.WORLD

    @property
    def first(self) -> bool:
        """Whether this rank is the one that reports and writes results."""
        return self.rank == 0

    def owners(self, costs: Sequence[float]) -> list[int]:
        """A rank for each piece of work such that the costs are spread evenly; equal on all ranks."""
        load = [0.0] * self.size
        ranks = [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda j: -costs[j]):
            ranks[i] = min(range(self.size), key=load.__getitem__)
            load[ranks[i]] += costs[i]
        return ranks

    def share(self, tensors: Mapping[str, Tensor] | None, owner: int) -> dict[str, Tensor]:
        """The owner's tensors by name, on all ranks, in CPU memory.

        Args:
            tensors: at the owner; ignored elsewhere.
            owner: its rank.

        Raises:
            WorkerError: when a rank is gone.
        """
        mine = dict(tensors or {}) if self.rank == owner else {}
        if self.size == 1:
            return mine
        with self._reporting():
            header = json.dumps([[n, str(t.dtype), list(t.shape)] for n, t in mine.items()]).encode()
            length = self._broadcast(torch.tensor([len(header)]), owner)
            text = torch.frombuffer(bytearray(header), dtype=torch.uint8) if self.rank == owner else None
            told = self._broadcast(torch.empty(int(length), dtype=torch.uint8) if text is None else text, owner)
            shared = {}
            for name, dtype, shape in json.loads(bytes(told.tolist())):
                full = mine.get(name, torch.empty(0)).cpu() if self.rank == owner else None
                tensor = torch.empty(shape, dtype=_DTYPES[dtype]) if full is None else full.contiguous()
                if tensor.numel():
                    tensor = self._broadcast(tensor.reshape(-1).view(torch.uint8), owner).view(tensor.dtype)
                shared[name] = tensor.reshape(shape)
            return shared

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of every rank, by rank, on all ranks; names and shapes may differ.

        Raises:
            WorkerError: when a rank is gone.
        """
        return [self.share(tensors, rank) for rank in range(self.size)]

    def _broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        device = torch.device("cpu")
        if "gloo" not in dist.get_backend_config(self.part):
            device = torch.device("cuda", torch.cuda.current_device())
        moved = tensor.to(device)
        dist.broadcast(moved, owner if self.part is None else dist.get_global_rank(self.part, owner), group=self.part)
        return moved.cpu()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise WorkerError(
                f"rank {self.rank} of {self.size} lost another rank ({reason}). The job ends on all ranks; the first "
                "error of another rank says why. Run the same command again: with a checkpoint directory finished "
                "layers are kept"
            ) from error


@contextlib.contextmanager
def launched() -> Iterator[Workers]:
    """The ranks that ``torchrun`` started, or this process alone; the process group lives while the block runs.

    gloo carries tensors between CPUs and nccl between GPUs; each rank takes the GPU of its local rank.

    Raises:
        WorkerError: when the ranks cannot find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        yield Workers()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=_LONGEST_STEP)
    except (RuntimeError, ValueError) as error:
        raise WorkerError(f"the ranks of torchrun cannot find each other: {error}") from error
    try:
        yield Workers.of(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
