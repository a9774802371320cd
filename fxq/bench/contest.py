"""A case and its contestants: build, check against the reference, then time what passed."""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fxq.numerics import decibels, energy
from fxq.runtime.messages import kind_and_line
from fxq.runtime.timing import Clock, Ratio, interleave, ratio, repeats

FP32, BF16 = "fp32 eager", "bf16 eager"
BASELINES = (FP32, BF16)
Status = Literal["ok", "wrong", "failed", "skipped"]
EXACT = 200.0  # dB; equal outputs would be infinite
EXTRA = ("torchao", "onnx", "onnxruntime", "openvino")
"""Packages of fxq's extra ``bench``."""


@dataclass(frozen=True)
class Built:
    """A contestant ready to run: compiled, weights packed.

    Attributes:
        call: what is timed.
        kernel: what runs in it, for the report.
        output: what is compared with the reference; None: the result of ``call``.
        refusal: why the contestant's own check failed, or "".
        facts: JSON facts for the results file.
    """

    call: Callable[[], object]
    kernel: str = ""
    output: Callable[[], object] | None = None
    refusal: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """A way to compute a case.

    Attributes:
        name: shown in tables; unique in a case.
        build: compiles and packs; may raise.
        least_sqnr: in dB; an output below it is wrong.
        arithmetic: "float32", "bfloat16", "int8", "int4" (weights of 4 bits) or "float8": what multiplies.
        dtype: of the float inputs and outputs.
        needs: package that has to be installed, or "".
        ours: whether it is this library's.
        obstacle: why it cannot run on this machine, or "".
    """

    name: str
    build: Callable[[], Built]
    least_sqnr: float
    arithmetic: str = "int8"
    dtype: str = "float32"
    needs: str = ""
    ours: bool = False
    obstacle: str = ""


@dataclass(frozen=True)
class Case:
    """Contestants for one computation on the same inputs.

    Attributes:
        name: shown in tables.
        reference: the trusted output, after ``pick``.
        contestants: in the order of tables.
        pick: part of an output that is compared, such as a few rows.
        facts: shapes, for the results file.
    """

    name: str
    reference: Callable[[], Tensor]
    contestants: tuple[Contestant, ...]
    pick: Callable[[Any], Tensor] = lambda output: output
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What became of a contestant. ``seconds`` are per call, one a round, and empty unless ``status`` is "ok"."""

    name: str
    status: Status
    note: str = ""
    kernel: str = ""
    arithmetic: str = "int8"
    dtype: str = ""
    ours: bool = False
    sqnr: float | None = None
    seconds: tuple[float, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        """Whether the run must not pass: a wrong result of anyone, or any error of this library's."""
        return self.status == "wrong" or (self.ours and self.status == "failed")


@dataclass(frozen=True)
class CaseResult:
    """Results of a case in the order of its contestants."""

    name: str
    facts: Mapping[str, Any]
    results: tuple[Result, ...]

    def ratio(self, name: str, baseline: str) -> Ratio | None:
        """Speed of a contestant relative to another; None unless both passed."""
        seconds = {result.name: result.seconds for result in self.results}
        a, b = seconds.get(name), seconds.get(baseline)
        return ratio(b, a) if a and b else None

    @property
    def fastest_float(self) -> str | None:
        """The fastest contestant that multiplies in float32 or bfloat16: what int8 really has to beat."""
        floats = [r for r in self.results if r.arithmetic in ("float32", "bfloat16") and r.seconds]
        return min(floats, key=lambda r: statistics.median(r.seconds)).name if floats else None


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def sqnr(reference: Tensor, output: Tensor) -> float:
    """Signal to error in dB, at most 200; minus infinity for an output that is not finite."""
    expected, got = reference.double(), output.to(reference.device).double()
    if not bool(got.isfinite().all()):
        return -math.inf
    return min(EXACT, decibels(energy(expected), energy(expected - got)))


def _judge(case: Case, contestant: Contestant, built: Built, reference: Tensor) -> tuple[float | None, str]:
    """(SQNR, why it is wrong or "")."""
    if built.refusal:
        return None, built.refusal
    output = case.pick((built.output or built.call)())
    if output.shape != reference.shape:
        return None, f"output is {tuple(output.shape)}, the reference {tuple(reference.shape)}"
    found = sqnr(reference, output)
    if not found >= contestant.least_sqnr:
        return found, f"SQNR {found:.1f} dB, expected at least {contestant.least_sqnr:g}"
    return found, ""


def _prepare(
    case: Case, contestant: Contestant, reference: Tensor, clock: Clock
) -> tuple[Result, tuple[Callable[[], object], int] | None]:
    """The verdict, and for a contestant that passed what to time and how often per sample."""

    def result(status: Status, note: str = "", **more: Any) -> Result:
        who = {name: getattr(contestant, name) for name in ("name", "arithmetic", "dtype", "ours")}
        return Result(status=status, note=note, **who, **more)

    if contestant.needs and not installed(contestant.needs):
        hint = ": pip install 'fxq[bench]'" if contestant.needs in EXTRA else ""
        return result("skipped", f"{contestant.needs} is not installed{hint}"), None
    if contestant.obstacle:
        return result("skipped", contestant.obstacle), None
    try:
        built = contestant.build()
        found, why = _judge(case, contestant, built, reference)
        count = repeats(built.call, clock)
    except Exception as error:
        return result("failed", kind_and_line(error)), None
    more: dict[str, Any] = {"kernel": built.kernel, "sqnr": found, "facts": built.facts}
    return (result("wrong", why, **more), None) if why else (result("ok", **more), (built.call, count))


def run_case(case: Case, rounds: int, clock: Clock, on_step: Callable[[str], None] | None = None) -> CaseResult:
    """Build, check and time the contestants of a case; one that fails, or is wrong, does not stop the others.

    Args:
        case: what to measure.
        rounds: samples of each contestant, at least 2.
        clock: seconds now.
        on_step: told what is being done.
    """
    say = on_step or (lambda _: None)
    reference = case.reference()
    results, timed = {}, {}
    for contestant in case.contestants:
        say(f"{case.name}: building {contestant.name}")
        results[contestant.name], ready = _prepare(case, contestant, reference, clock)
        if ready is not None:
            timed[contestant.name] = ready
    say(f"{case.name}: timing {len(timed)} contestants")
    finished = _timed(results, timed, rounds, clock)
    torch.compiler.reset()
    gc.collect()
    return CaseResult(case.name, case.facts, finished)


def _timed(
    results: Mapping[str, Result], timed: Mapping[str, tuple[Callable[[], object], int]], rounds: int, clock: Clock
) -> tuple[Result, ...]:
    calls = {name: call for name, (call, _) in timed.items()}
    timing = interleave(calls, rounds, clock, {name: count for name, (_, count) in timed.items()})
    finished = []
    for name, result in results.items():
        changed: dict[str, object] = {}
        if name in timing.failures:
            changed = {"status": "failed", "note": kind_and_line(timing.failures[name])}
        elif name in timing.seconds:
            changed = {"seconds": tuple(timing.seconds[name])}
        finished.append(Result(**{**vars(result), **changed}))
    return tuple(finished)
