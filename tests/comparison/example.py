"""A comparison without a model: made-up measures, the same for the same row and seed."""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from typing import ClassVar

import numpy as np

from fxq.comparison.measure import Extent, Reference, Seconds
from fxq.comparison.methods import Entry
from fxq.comparison.results import Results
from fxq.comparison.run import Plan, run
from fxq.comparison.subject import Subject
from tests.report.example import BITS, variant

PLAN = Plan(methods=("minmax", "nearest", "q_arvd"), bits=("w8a8", "w4a8"), extent=Extent(videos=5))
SUBJECT = Subject(name="made up", identity={"model": "made up"}, rollouts=lambda *_: (None, None))
BETTER = {"minmax": 1.0, "nearest": 0.7, "q_arvd": 0.3}


class MadeUp:
    """Stands for :class:`fxq.comparison.measure.Bench`."""

    measured: ClassVar[list[tuple[int, str, str]]] = []
    fails_after: ClassVar[int | None] = None

    def __init__(self, subject, extent, seed, bar, before=None):
        self.seed, self.extent = seed, extent
        scores = {"shape": 0.97, "colour": 1.0, "motion": 0.95, "exact_steps": 0.93}
        chunks = extent.chunks or 7
        self.reference = Reference(scores=scores, limits=(-1.0, 1.0), chunks=chunks, trained=7)

    def measure(self, entry: Entry, bar):
        if self.fails_after is not None and len(self.measured) >= self.fails_after:
            raise KeyboardInterrupt
        self.measured.append((self.seed, entry.bits, entry.method))
        generator = np.random.default_rng(zlib.crc32(f"{self.seed} {entry.bits} {entry.method}".encode()))
        error = BITS[entry.bits.upper()] * BETTER.get(entry.method.partition(":")[0], 1.0)
        made = variant(entry.method, entry.bits.upper(), error, self.extent.videos, generator)
        seconds = Seconds(statistics=1.0, sensitivity=0.5, methods=2.0)
        return dataclasses.replace(made, seconds=seconds.total), seconds


def made_up(monkeypatch, folder: pathlib.Path, plan: Plan = PLAN, fails_after: int | None = None, **subject) -> Results:
    """Run a plan on made-up measures; a number of rows after which it is stopped may be given."""
    monkeypatch.setattr("fxq.comparison.run.Bench", MadeUp)
    monkeypatch.setattr(MadeUp, "measured", [])
    monkeypatch.setattr(MadeUp, "fails_after", fails_after)
    return run(plan, dataclasses.replace(SUBJECT, **subject), folder, "fxq compare ...", progress=False)
