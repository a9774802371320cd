"""How the ranks of a job meet, and signs of life between them: who is there, how far, and what went wrong where."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from fxq.runtime.messages import kind_and_line

TIMEOUT = "FXQ_RANK_TIMEOUT"
"""Environment variable: seconds after which a rank without a sign of life counts as lost."""
DEFAULT_SECONDS = 90.0
_FASTEST, _SLOWEST, _IDLE = 0.001, 0.1, 1.0  # seconds between two looks at the store
_LONGEST_STEP = datetime.timedelta(days=1)


class WorkerError(RuntimeError):
    """A rank of the job failed, was lost or does another job; the job cannot go on."""


def patience(seconds: float | None = None) -> float:
    """Seconds to wait for a rank that gives no sign of life: the given ones, else ``FXQ_RANK_TIMEOUT``, else 90.

    Raises:
        WorkerError: when that is no positive number.
    """
    text = os.environ.get(TIMEOUT, "") if seconds is None else str(seconds)
    try:
        found = float(text or DEFAULT_SECONDS)
    except ValueError:
        found = -1.0
    if not 0 < found < float("inf"):
        raise WorkerError(f"{TIMEOUT}={text!r}: expected a positive number of seconds, such as 90")
    return found


@dataclasses.dataclass(frozen=True)
class Sign:
    """What a rank says of itself: ``beat`` counts up, ``at`` is the number of meetings it came to."""

    beat: int = 0
    at: int = 0
    failed: str = ""
    left: bool = False
    host: str = ""
    process: int = 0


def _host() -> str:
    """Where process ids mean the same."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{platform.node()} {space}"


def _ended(process: int) -> bool:
    """Whether a process of this host has ended, as far as that can be seen."""
    if not pathlib.Path("/proc/self/stat").exists():
        return False
    try:
        state = pathlib.Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return state.rpartition(")")[2].split()[:1] in (["Z"], ["X"])


class Watch:
    """Tells the other ranks that this one lives, and watches that they do.

    One thread does everything that has to do with the store, as any look at it may wait for ever.

    Args:
        connect: gives the store where the signs are; of this job, or call, alone.
        rank: this one.
        size: number of ranks.
        seconds: see :func:`patience`.
        parent: the watch of the job that this call belongs to; a rank that is late here and lives there is waited for.
        keeper: whose process holds the store, for messages.
    """

    def __init__(
        self,
        connect: Callable[[], object],
        rank: int,
        size: int,
        seconds: float,
        parent: Watch | None = None,
        keeper: str = "rank 0",
    ) -> None:
        self.connect, self.rank, self.size, self.seconds = connect, rank, size, seconds
        self.parent, self.keeper = parent, keeper
        self.store: Any = None
        self._own = Sign(host=_host(), process=os.getpid())
        self._signs: dict[int, Sign] = {}
        self._changes: dict[int, float] = {}
        self._ended: set[int] = set()
        self._looks, self._looked, self._started = 0, time.monotonic(), time.monotonic()
        self._broken: Exception | None = None
        self._pause, self._wake = _IDLE, threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fxq-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.store = self.connect()
            while self._look():
                with self._changed:
                    self._changed.notify_all()
                self._wake.wait(min(self._pause, self.seconds / 5))
                self._wake.clear()
        except Exception as error:  # the store's process is gone; what uses the watch says so
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _look(self) -> bool:
        """Leave a sign and read those of the others; False once this rank has said its last."""
        with self._changed:
            own = self._own = dataclasses.replace(self._own, beat=self._own.beat + 1)
            self._pause = _IDLE if self._pause > _SLOWEST else min(2 * self._pause, _SLOWEST)
        self.store.set(str(self.rank), json.dumps(dataclasses.asdict(own)))
        if own.left:
            return False
        # Before reading, so that the last sign of a process that has ended is known by then.
        ended = {r for r, sign in self._signs.items() if sign.host == self._own.host and _ended(sign.process)}
        found = {rank: self._read(rank) for rank in range(self.size) if rank != self.rank}
        with self._changed:
            self._ended, self._looks, self._looked = ended, self._looks + 1, time.monotonic()
            for rank, sign in found.items():
                if sign is not None and sign != self._signs.get(rank):
                    self._signs[rank], self._changes[rank] = sign, self._looked
        return True

    def _read(self, rank: int) -> Sign | None:
        if not self.store.check([str(rank)]):  # reading what is not there would wait for it
            return None
        return Sign(**json.loads(self.store.get(str(rank))))

    def lost(self) -> str:
        """Which rank is lost and why, or ""."""
        with self._changed:
            if self.parent is not None and (reason := self.parent.lost()):
                return reason
            reasons = {rank: self._reason(rank) for rank in range(self.size) if rank != self.rank}
            # A rank that ended because of another is not what is to be looked at.
            for rank in sorted(reasons, key=lambda r: WorkerError.__name__ in reasons[r]):
                if reasons[rank]:
                    return f"rank {rank} of {self.size} {reasons[rank]}"
            if self._broken is not None:
                return f"{self.keeper}, where the ranks meet, is gone ({kind_and_line(self._broken)})"
            return ""

    def _reason(self, rank: int) -> str:
        sign = self._signs.get(rank)
        if sign is None:
            late = self._looked - self._started > self.seconds
            return f"did not come within {self.seconds:g} s" if late and self.parent is None else ""
        if sign.failed:
            return f"failed: {sign.failed}"
        if sign.left:
            return ""
        if rank in self._ended:
            return "has ended without a word, as a killed process does"
        if self._looked - self._changes[rank] > self.seconds:
            return f"has given no sign of life for {self.seconds:g} s: it is stopped, or its machine is gone"
        return ""

    def check(self) -> None:
        """Go on only if no rank is known to be lost.

        Raises:
            WorkerError: naming the rank.
        """
        if reason := self.lost():
            raise self.error(reason)

    def error(self, reason: str) -> WorkerError:
        """The error of this rank for what happened to another."""
        return WorkerError(
            f"rank {self.rank} of {self.size} lost another rank: {reason}. The job ends on all ranks. Run the same "
            f"command again: with a checkpoint directory finished layers are kept. {TIMEOUT} sets the seconds that a "
            "rank is waited for"
        )

    def meet(self) -> None:
        """Wait until every rank has come to its meeting of this number.

        Raises:
            WorkerError: naming a rank that is lost, or that has left.
        """
        with self._changed:
            self._own = dataclasses.replace(self._own, at=self._own.at + 1)
            number = self._own.at
        self.until(lambda: all(sign.at >= number for sign in self._all()), number)

    def _all(self) -> list[Sign]:
        return [self._signs.get(rank, Sign()) for rank in range(self.size) if rank != self.rank]

    def until(self, ready: Callable[[], bool], number: int = 0) -> None:
        """Wait for something that needs the other ranks, as long as they live.

        Raises:
            WorkerError: naming the rank that is lost.
        """
        silent, looks, before = 0.0, -1, time.monotonic()
        self._pause = _FASTEST
        self._wake.set()
        while True:
            with self._changed:
                if ready():
                    self._pause = _IDLE
                    return
                self.check()
                if gone := [r for r, sign in self._signs.items() if sign.left and sign.at < number]:
                    raise self.error(f"rank {gone[0]} of {self.size} left: it made other calls than this rank")
                self._changed.wait(_SLOWEST)
                # A stopped process must not take its own pause for the silence of others.
                now = time.monotonic()
                silent = silent + min(now - before, 2 * _SLOWEST) if self._looks == looks else 0.0
                looks, before = self._looks, now
            if silent > self.seconds:
                raise self.error(f"{self.keeper}, where the ranks meet, has not answered for {self.seconds:g} s")

    def why(self, wait: float = 5.0) -> str:
        """After a failed exchange: which rank is lost, or "" when that does not become known soon."""
        end = time.monotonic() + min(wait, self.seconds)
        while not (reason := self.lost()) and time.monotonic() < end:
            time.sleep(_SLOWEST)
        return reason

    def end(self, error: BaseException | None = None) -> None:
        """Say goodbye, with the error that ends this rank's part, if any, and stop watching."""
        with self._changed:
            failed = "" if error is None else kind_and_line(error)
            self._own = dataclasses.replace(self._own, left=True, failed=failed)
        self._wake.set()
        longest = min(5.0, self.seconds)
        answers = self._broken is None and time.monotonic() - self._looked < longest
        of_its_own = error is not None and not isinstance(error, WorkerError)  # the others must hear of it
        self._thread.join(longest if answers or of_its_own else _SLOWEST)
        if failed and self.rank == 0:
            time.sleep(min(_IDLE, self.seconds / 5))  # the store may end with this process, and the others must read it


def connection_of_its_own(store: Any) -> Any:
    """Another connection to the same store where torch can make one: who waits in one holds up all others in it."""
    with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):
        return store.clone()
    return store


def prefixed(store: Any, prefix: str) -> Any:
    """The part of a store whose keys have a prefix."""
    distributed: Any = dist
    return distributed.PrefixStore(prefix, store)


def keeper() -> str:
    """Whose process holds the store."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return "torchrun" if agent else "rank 0"


def meeting_place(rank: int, size: int, seconds: float, first: bool = True) -> object:
    """A connection to the store of the ranks that ``MASTER_ADDR`` and ``MASTER_PORT`` name, which the first opens."""
    distributed: Any = dist
    host, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "29500"))
    agent = keeper() != "rank 0"
    try:
        store = distributed.TCPStore(
            host,
            port,
            size,
            is_master=first and rank == 0 and not agent,
            timeout=datetime.timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise WorkerError(
            f"rank {rank} of {size} cannot reach {keeper()} at {host}:{port} within {seconds:g} s "
            f"({kind_and_line(error)}). Start all ranks; {TIMEOUT} sets the seconds that they are waited for"
        ) from error
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return prefixed(store, f"/worker/attempt_{restart}") if agent else store


def join_group(watch: Watch, backend: str, place: Any) -> None:
    """Make the process group of all ranks.

    torch waits for every rank while it does, and would for one that has stopped: this waits for torch in a thread, and
    no longer than the ranks live.

    Raises:
        WorkerError: when a rank is lost meanwhile, or torch fails.
    """
    errors: list[Exception | None] = []

    def join() -> None:
        try:
            dist.init_process_group(backend, store=place, rank=watch.rank, world_size=watch.size, timeout=_LONGEST_STEP)
        except Exception as error:
            errors.append(error)
        else:
            errors.append(None)

    threading.Thread(target=join, name="fxq-join", daemon=True).start()
    watch.until(lambda: bool(errors))
    if (error := errors[0]) is not None:
        raise WorkerError(f"the ranks of torchrun cannot find each other: {kind_and_line(error)}") from error
