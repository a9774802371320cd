"""Interleaved timing: all contestants in one process, round robin in rotating order, compared by ratios per round.

Machines are noisy and drift; two calls of one round see the same machine, so their ratio is stable where times are not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

Clock = Callable[[], float]
Timed = Callable[[], object]

LEAST_SECONDS = 0.02
"""A sample lasts at least this long; short calls are repeated in it."""


@dataclass(frozen=True)
class Ratio:
    """How many times faster than a baseline: median over rounds and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Timing:
    """``seconds`` per call by contestant, one entry a round; ``failures`` by contestant that raised."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)


@contextmanager
def settings(threads: int) -> Iterator[None]:
    """The same for all contestants: ``threads`` threads, and compilers that fold weights and never fall back to eager.

    All contestants of a case share code objects, and torch.compile stops compiling one of them quietly after 8 times.
    """
    import torch._dynamo.config as dynamo  # slow to import, and every command of fxq would
    import torch._inductor.config as inductor

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with (
            inductor.patch(freezing=True),
            dynamo.patch(recompile_limit=64, fail_on_recompile_limit_hit=True),
            torch.no_grad(),
        ):
            yield
    finally:
        torch.set_num_threads(before)


def clock_for(threads: int, device: str) -> tuple[str, Clock]:
    """Name and clock: CPU time of the process for one thread, wall clock for several, synchronised wall for a GPU.

    CPU time counts every thread, so a contestant that takes more threads than it was given wins nothing by it.
    """
    if torch.device(device).type == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return "wall, synchronised", synchronised
    return ("cpu", time.process_time) if threads == 1 else ("wall", time.perf_counter)


def repeats(call: Timed, clock: Clock, least: float = LEAST_SECONDS) -> int:
    """Calls per sample so that it lasts at least ``least`` seconds, judged by one call; 1..1000."""
    start = clock()
    call()
    once = clock() - start
    return 1000 if once <= 0 else max(1, min(1000, math.ceil(least / once)))


def interleave(
    calls: Mapping[str, Timed], rounds: int, clock: Clock, counts: Mapping[str, int] | None = None
) -> Timing:
    """Time every call once a round; round r starts with contestant r.

    A call that raises is left out from then on, and its times are dropped.

    Args:
        calls: contestants by name, warm.
        rounds: samples of each.
        clock: seconds now.
        counts: calls per sample by name; 1 where absent.
    """
    names, counts = list(calls), counts or {}
    timing = Timing({name: [] for name in names})
    for r in range(rounds):
        first = r % max(1, len(names))
        for name in names[first:] + names[:first]:
            if name in timing.failures:
                continue
            try:
                timing.seconds[name].append(_sample(calls[name], counts.get(name, 1), clock))
            except Exception as error:
                timing.failures[name] = error
    for name in timing.failures:
        del timing.seconds[name]
    return timing


def _sample(call: Timed, count: int, clock: Clock) -> float:
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count


def ratio(baseline: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """Speed relative to a baseline timed in the same rounds.

    Raises:
        ValueError: when the two were not timed in the same number of rounds, or in less than two.
    """
    if len(baseline) != len(seconds) or len(seconds) < 2:
        raise ValueError(f"{len(baseline)} and {len(seconds)} rounds: expected the same number, at least 2")
    ratios = [b / max(s, 1e-12) for b, s in zip(baseline, seconds, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)
