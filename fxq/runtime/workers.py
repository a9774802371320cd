"""One job on several processes: who does what, and how they tell each other (torch.distributed, gloo or nccl)."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxq.runtime.differences import differences
from fxq.runtime.messages import kind_and_line
from fxq.runtime.ranks import (
    Watch,
    WorkerError,
    connection_of_its_own,
    join_group,
    keeper,
    meeting_place,
    patience,
    prefixed,
)
from fxq.runtime.streams import warn

__all__ = ["WorkerError", "Workers", "launched", "let_go_of_default_group"]

_SLOWEST_LOOK = 0.05
_DTYPES = {str(d): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)}
_DTYPES |= {str(d): d for d in (torch.int16, torch.int8, torch.uint8, torch.bool)}

_calls: collections.defaultdict[str, Iterator[int]] = collections.defaultdict(itertools.count)
"""Numbers of the calls that share work, by group: ranks make the same calls in the same order."""
_job: Watch | None = None
"""The watch of the block of :func:`launched` that this process is in."""


def let_go_of_default_group() -> None:
    """Keep functions of torch from holding the default process group after its end.

    ``torch.distributed.nn.functional`` has it as a default argument when it is imported, as Dynamo does, while there is
    one. A group that lives on at the end of the process has threads that still hold tensors of the last exchange; when
    they drop them they need the interpreter, and "terminate called without an active exception" ends the process. None
    means the default group as well.
    """
    if not dist.is_available():
        return
    import torch.distributed.nn.functional as functions

    for function in vars(functions).values():
        defaults = getattr(function, "__defaults__", None) or ()
        if any(isinstance(value, dist.ProcessGroup) for value in defaults):
            function.__defaults__ = tuple(None if isinstance(v, dist.ProcessGroup) else v for v in defaults)


let_go_of_default_group()


@dataclasses.dataclass(frozen=True)
class Workers:
    """The ranks that share a job; ``Workers()`` is one process alone.

    Every rank makes the same calls in the same order. Work is split by position, so that the result does not depend on
    the number of ranks. ``part`` is a process group other than the default one; with a ``watch`` a rank that is lost
    ends every wait for it.
    """

    rank: int = 0
    size: int = 1
    part: dist.ProcessGroup | None = None
    watch: Watch | None = dataclasses.field(default=None, compare=False, repr=False)

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
        self._meet()
        return self._share(mine, owner)

    def _share(self, mine: dict[str, Tensor], owner: int) -> dict[str, Tensor]:
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
        if self.size == 1:
            return [dict(tensors)]
        self._meet()
        return [self._share(dict(tensors) if rank == self.rank else {}, rank) for rank in range(self.size)]

    def agree(self, facts: Mapping[str, Mapping[str, str]]) -> None:
        """Compare facts, by subject and name, with those of the other ranks.

        Raises:
            WorkerError: on every rank, naming a rank and what it has otherwise than the first; or when a rank is gone.
        """
        if found := differences(self._tell(facts)):
            raise WorkerError(
                f"the ranks do not do the same job: {'; '.join(found)}. Start every rank with the same command, files "
                "and versions"
            )

    def compare_threads(self) -> None:
        """Warn when ranks compute with different numbers of threads: sums in float32 then differ in the last bits."""
        told = [facts["threads"]["threads"] for facts in self._tell({"threads": {"threads": str(_threads())}})]
        if len(set(told)) > 1:
            warn(
                f"the ranks compute with different numbers of threads ({', '.join(told)} by rank): the result may "
                "differ in single integers from that of one process. Set OMP_NUM_THREADS to the same on all of them",
                stacklevel=4,
            )

    def _tell(self, facts: Mapping[str, Mapping[str, str]]) -> list[dict[str, dict[str, str]]]:
        text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        return [json.loads(bytes(part["facts"].tolist())) for part in self.gather({"facts": text})]

    @contextlib.contextmanager
    def watched(self) -> Iterator[Workers]:
        """These ranks, each watching that the others live while they are in such a block of the same call.

        An error that leaves the block reaches the other ranks. Waiting takes ``FXQ_RANK_TIMEOUT`` seconds at most for a
        rank that gives no sign of life.

        Raises:
            WorkerError: from what is called in the block, naming the rank that is lost.
        """
        store = None if self.size == 1 else _default_store()
        if store is None:
            yield self
            return
        name = str(getattr(self.group, "group_name", ""))
        prefix = f"fxq/{name}/{next(_calls[name])}"
        parent = _parent(self)
        seconds = patience() if parent is None else parent.seconds

        def connect() -> object:
            # The job's own connection is there already, and no one waits in it.
            return prefixed(connection_of_its_own(store) if parent is None else parent.store, prefix)

        watch = Watch(connect, self.rank, self.size, seconds, parent, keeper())
        with _ending(watch):
            yield dataclasses.replace(self, watch=watch)

    def _meet(self) -> None:
        if self.watch is not None:
            self.watch.meet()

    def _broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        device = torch.device("cpu")
        if "gloo" not in dist.get_backend_config(self.part):
            device = torch.device("cuda", torch.cuda.current_device())
        moved = tensor.to(device)
        source = owner if self.part is None else dist.get_global_rank(self.part, owner)
        work: Any = dist.broadcast(moved, source, group=self.part, async_op=True)
        pause = 1e-4
        while self.watch is not None and not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, _SLOWEST_LOOK)
            if reason := self.watch.lost():
                # The end of a group waits for its exchanges, and this one has no end.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))
                raise self.watch.error(reason)
        work.wait()
        return moved.cpu()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except WorkerError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = "" if self.watch is None else self.watch.why()
            if self.watch is not None and reason:
                raise self.watch.error(reason) from error
            raise WorkerError(
                f"rank {self.rank} of {self.size} lost another rank ({kind_and_line(error)}). The job ends on all "
                "ranks; the first error of another rank says why. Run the same command again: with a checkpoint "
                "directory finished layers are kept"
            ) from error


def _threads() -> int:
    return torch.get_num_threads()


def _default_store() -> object:
    """The store that the ranks of the default group met at; None where torch does not tell."""
    try:
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None


def _parent(workers: Workers) -> Watch | None:
    """The watch of the job, when it has the same ranks."""
    return _job if workers.part is None else None


@contextlib.contextmanager
def _ending(watch: Watch) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        watch.end(error)
        raise
    watch.end()


@contextlib.contextmanager
def launched(timeout: float | None = None) -> Iterator[Workers]:
    """The ranks that ``torchrun`` started, or this process alone; the process group lives while the block runs.

    gloo carries tensors between CPUs and nccl between GPUs; each rank takes the GPU of its local rank. An error that
    leaves the block on one rank ends the others, too.

    Args:
        timeout: seconds after which a rank that does not come, or gives no sign of life, counts as lost;
            ``FXQ_RANK_TIMEOUT`` from the environment by default, else 90.

    Raises:
        WorkerError: when the ranks cannot find each other, or one is lost; it names the rank.
    """
    global _job
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        yield Workers()
        return
    seconds = patience(timeout)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    store = meeting_place(rank, size, seconds)

    def connect() -> object:
        return prefixed(meeting_place(rank, size, seconds, first=False), "fxq/job")

    watch = Watch(connect, rank, size, seconds, None, keeper())
    with _ending(watch):
        watch.meet()
        join_group(watch, backend, prefixed(store, "fxq/group"))
        before, _job = _job, watch
        try:
            yield dataclasses.replace(Workers.of(dist.group.WORLD), watch=watch)
        finally:
            _job = before
            dist.destroy_process_group()
