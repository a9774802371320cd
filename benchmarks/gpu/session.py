"""The steps of a GPU benchmark: each is checked, timed, kept in the journal, and lost alone when it fails."""

from __future__ import annotations

import dataclasses
import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.graphs import DeviceClock, replayed
from benchmarks.gpu.journal import Journal
from fxq.bench.contest import Built, Case, CaseResult, Contestant, run_case
from fxq.runtime.messages import kind_and_line

DEAD = 13
"""Exit code of a worker whose GPU context a kernel broke."""

TRACE = 4000
"""Characters of a traceback that the journal keeps."""

BOUNDS = {"bfloat16": 35.0, "int8": 25.0, "float8": 20.0, "int4": 12.0}
"""dB against float64, by arithmetic, of one linear."""


def fastest_bf16(case: CaseResult) -> str:
    """The fastest contestant of others that multiplies in bfloat16: what integers have to beat; "" without one."""
    rows = [row for row in case.results if row.arithmetic == "bfloat16" and row.seconds and not row.ours]
    return min(rows, key=lambda row: statistics.median(row.seconds)).name if rows else ""


@dataclass(frozen=True)
class Entry:
    """A contestant before it is wrapped.

    Attributes:
        name: unique in its case.
        make: prepares the call that is timed, or a whole :class:`fxq.bench.contest.Built`.
        arithmetic: see :class:`fxq.bench.contest.Contestant`; "int4" for packed weights.
        bound: least SQNR; None: by arithmetic.
        uses: checks that must have passed.
        finish: from the call's result to what is compared.
        graph: whether the call is replayed from a CUDA graph.
        cold: whether the L2 cache is flushed before every call.
        needs: package, or "".
        takes: seconds to build and time it, about; it is left out when less are left of the run.
    """

    name: str
    make: Callable[[], Callable[[], Any] | Built]
    arithmetic: str = "int8"
    bound: float | None = None
    uses: tuple[str, ...] = ()
    finish: Callable[[Any], Any] = lambda output: output
    graph: bool = True
    cold: bool = True
    needs: str = ""
    takes: float = 0.0


@dataclass
class Session:
    """What steps share.

    Attributes:
        device: "cuda" or "cpu".
        dry: control flow only; nothing that looks like a measurement is kept.
        rounds: samples of each contestant.
        journal: where results go.
        began: time.time() of the first process of this run.
        budget: seconds after ``began`` at which all should be over.
        deadlines: by section, seconds after ``began`` from which no step is started.
    """

    device: str
    dry: bool
    rounds: int
    journal: Journal
    began: float
    budget: float
    deadlines: Mapping[str, float]
    clock: DeviceClock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = DeviceClock(self.device)

    def step(self, section: str, name: str, work: Callable[[str], dict[str, Any]]) -> None:
        """Run ``work(step)`` unless it was done, is out of time, or killed a process; errors are kept, not raised."""
        step = f"{section}/{name}"
        if step in self.journal.finished:
            return
        if time.time() - self.began > self.deadlines[section]:
            self.journal.write("skip", step=step, why=f"out of time: {self.deadlines[section]:.0f} s after the start")
            return
        self.journal.write("start", step=step)
        began = time.time()
        try:
            data = work(step)
        except Exception as error:
            self.journal.write("trace", step=step, text=traceback.format_exc()[-TRACE:])
            self.leave_if_broken(error)
            data = {"error": kind_and_line(error)}
        self.journal.write("done", step=step, took=round(time.time() - began, 2), data=data)
        gc.collect()
        if self.clock.on_gpu:
            torch.cuda.empty_cache()

    def leave_if_broken(self, error: Exception) -> None:
        """End this process when the GPU's context is lost: nothing after it would run, a new process goes on."""
        if not self.clock.on_gpu:
            return
        try:
            torch.cuda.synchronize()
            torch.ones(1, device=self.device).add_(1).item()
        except Exception:
            self.journal.write("broken", why=kind_and_line(error))
            os._exit(DEAD)

    def unchecked(self, uses: Iterable[str]) -> str:
        """Why the results of these kernels must not be timed, or ""."""
        data = {line["step"]: line["data"] for line in self.journal.of("done")}
        for name in uses:
            check = data.get(f"checks/{name}", {"error": "was not run"})
            if problem := check.get("error") or check.get("problem"):
                return f"check of {name}: {problem}"
        return ""

    def contestant(self, step: str, entry: Entry) -> Contestant:
        """The entry with checks before, and its call captured and timed."""
        killer = self.journal.killers(step).get(entry.name, "")

        def build() -> Built:
            if reason := killer or self.unchecked(entry.uses):
                return Built(lambda: None, refusal=reason)
            if (left := self.began + self.budget - time.time()) < entry.takes:
                raise TimeoutError(f"out of time: {left:.0f} s left, it takes about {entry.takes:g}")
            self.journal.write("at", step=step, contestant=entry.name)
            try:
                return self._built(entry)
            except Exception as error:
                self.journal.write("trace", step=step, contestant=entry.name, text=traceback.format_exc()[-TRACE:])
                self.leave_if_broken(error)
                raise

        bound = BOUNDS[entry.arithmetic] if entry.bound is None else entry.bound
        ours = bool(entry.uses) and not entry.needs
        return Contestant(entry.name, build, bound, entry.arithmetic, "bfloat16", entry.needs, ours)

    def _built(self, entry: Entry) -> Built:
        made = entry.make()
        built = made if isinstance(made, Built) else Built(made)
        run = replayed(built.call, self.device, fresh_outputs=False) if entry.graph else built.call
        run()
        if self.clock.on_gpu:
            torch.cuda.synchronize()
        output = built.output or (lambda: entry.finish(run()))
        return dataclasses.replace(built, call=self.clock.timed(run, entry.cold), output=output)

    def contest(
        self,
        step: str,
        reference: Callable[[], Tensor],
        entries: Sequence[Entry],
        opponents: Sequence[str],
        pick: Callable[[Any], Tensor] = lambda output: output,
        work: Mapping[str, float] | None = None,
        rounds: int | None = None,
    ) -> dict[str, Any]:
        """Run a case; ``work`` holds "flop" or "bytes" of one call."""
        contestants = tuple(self.contestant(step, entry) for entry in entries)
        case = Case(step.split("/", 1)[1], reference, contestants, pick)

        def note(what: str) -> None:
            if "timing" in what:
                self.journal.write("at", step=step, contestant="")

        result = run_case(case, rounds or self.rounds, self.clock, note)
        if failures := [row.note for row in result.results if row.status == "failed"]:
            self.leave_if_broken(RuntimeError(failures[0]))
        return self._data(result, opponents, work or {})

    def _data(self, case: CaseResult, opponents: Sequence[str], work: Mapping[str, float]) -> dict[str, Any]:
        rows, best = [], "" if self.dry else fastest_bf16(case)
        compared = {*opponents, best}
        for result in case.results:
            row = dataclasses.asdict(result)
            row["sqnr"] = None if result.sqnr is None else round(max(result.sqnr, -999.0), 1)
            row["seconds"] = [] if self.dry else list(result.seconds)
            row["rates"], row["speed_over"] = {}, {}
            if row["seconds"]:
                middle = statistics.median(result.seconds)
                row["rates"] = {name: amount / middle / 1e12 for name, amount in work.items()}
                ratios = {name: case.ratio(result.name, name) for name in compared}
                row["speed_over"] = {name: dataclasses.asdict(r) for name, r in ratios.items() if r is not None}
            rows.append(row)
        return {"results": rows, "opponents": list(opponents), "best_bf16": best, "work": dict(work)}
