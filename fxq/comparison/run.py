"""The comparison from settings to results: what is missing is measured row by row, what is there is read."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from collections.abc import Sequence

from fxq.comparison.measure import Bench, Extent
from fxq.comparison.methods import ComparisonError, Entry, entries
from fxq.comparison.results import Results, full_precision_of, reliability_of, rows_of
from fxq.comparison.store import Store
from fxq.comparison.subject import Subject
from fxq.environment import environment
from fxq.runtime.messages import did_you_mean
from fxq.runtime.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared.

    ``methods`` and ``bits`` as :func:`fxq.comparison.methods.entries` has them; calibration ``seeds``; ``base``: the
    method that others are compared with, None: the first; ``iterations`` of methods that learn, None: the recipes'.
    """

    methods: Sequence[str]
    bits: Sequence[str]
    seeds: Sequence[int] = (1, 2)
    base: str | None = None
    iterations: int | None = None
    extent: Extent = dataclasses.field(default_factory=Extent)

    def entries(self) -> list[Entry]:
        """Its rows.

        Raises:
            ComparisonError: as :func:`fxq.comparison.methods.entries`; or for seeds that are not there, or twice.
            RecipeError: when a recipe is not right.
        """
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ComparisonError(f"seeds {', '.join(map(str, self.seeds))}: expected numbers from 0 on, each once")
        return entries(self.methods, self.bits, self.iterations)

    def base_among(self, rows: Sequence[Entry]) -> str:
        """Name of the base.

        Raises:
            ComparisonError: when no row has it.
        """
        names = list(dict.fromkeys(entry.method for entry in rows))
        base = entries(self.methods[:1], self.bits)[0].method if self.base is None else self.base
        if base not in names:
            hint = did_you_mean(base, names)
            raise ComparisonError(f"base {base!r} is not compared; {hint or 'expected one'} of: {', '.join(names)}")
        return base


def run(plan: Plan, subject: Subject, folder: pathlib.Path, command: str, progress: bool = True) -> Results:
    """Measure what ``folder`` does not have yet, and pool everything.

    Args:
        plan: what is compared.
        subject: on which model.
        folder: one file for each finished row is kept there.
        command: how it was called, for the results.
        progress: show progress bars on stderr.

    Raises:
        ComparisonError: when the plan cannot be, or the folder has results of other settings.
        RecipeError: when a recipe is not right, or does not fit the model.
        OSError: when the folder cannot be written.
    """
    rows = plan.entries()
    base = plan.base_among(rows)
    versions = environment()
    shared = dict(subject.identity) | dataclasses.asdict(plan.extent) | {"iterations": plan.iterations}
    store = Store(folder, shared | {"environment": versions})
    store.open()
    missing = {seed: [entry for entry in rows if store.row(entry, seed) is None] for seed in plan.seeds}
    done, total = 0, sum(map(len, missing.values()))
    bench = None
    for seed, left in missing.items():
        if not left and store.has_reference(seed):
            continue
        with Progress(progress, prefix=f"seed {seed} ") as bar:
            bench = Bench(subject, plan.extent, seed, bar, bench)
        store.write_reference(seed, bench.reference)
        for entry in left:
            done += 1
            with Progress(progress, prefix=f"{done}/{total} ") as bar:
                store.write_row(entry, seed, *bench.measure(entry, bar))
    measured = [{seed: found for seed in plan.seeds if (found := store.row(entry, seed)) is not None} for entry in rows]
    references = [store.reference(seed) for seed in plan.seeds]
    made, full = rows_of(measured, base), full_precision_of(references)
    methods = len(dict.fromkeys(entry.method for entry in rows))
    counts = {"method": methods, "video": plan.extent.videos * len(plan.seeds), "calibration seed": len(plan.seeds)}
    return Results(
        title=f"{subject.name}: " + ", ".join(f"{n} {what}{'s' * (n != 1)}" for what, n in counts.items()),
        command=command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        environment=versions,
        settings=shared | {"seeds": list(plan.seeds), "bits": list(dict.fromkeys(r.bits for r in rows)), "base": base},
        base=base,
        rows=made,
        full_precision=full,
        reliability=reliability_of(made, full),
        chunks=references[0].chunks,
        trained=references[0].trained,
    )
