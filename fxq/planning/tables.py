"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fxq.planning.gpus import GIB, Range
from fxq.planning.memory import activation_bytes, text_bytes
from fxq.planning.plan import Fit, Plan, cache_name, clock
from fxq.planning.report import assumptions


def plan_tables(plan: Plan) -> Iterator[RenderableType]:
    """Everything a plan says: sizes, cache over time, what fits, expected speed, assumptions."""
    yield _sizes(plan)
    yield _cache(plan)
    yield _fits(plan)
    yield _speed(plan)
    yield from (Text(f"expected gain of W8A8 over compiled bf16, {line}") for line in _gains(plan))
    yield Text("\nassumptions", style="bold")
    yield from (Text(f"- {line}") for line in assumptions(plan))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _range(values: Range) -> str:
    return " to ".join(f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}" for value in values)


def real_time(fps: Range, wanted: int) -> str:
    """Whether expected frames per second (low, high) reach the ``wanted`` ones: yes, perhaps or no."""
    return "yes" if fps[0] >= wanted else "perhaps" if fps[1] >= wanted else "no"


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _sizes(plan: Plan) -> Table:
    w = plan.workload
    title = f"{w.name} on {plan.gpu.name}, {clock(plan.minutes)} of video: estimated sizes"
    table = _table(title, "what", "GiB")
    for name, size in plan.weights.items():
        table.add_row(f"weights {name}", _gib(size))
    table.add_row("text keys and values", _gib(text_bytes(w.config)))
    for window in plan.windows:
        size = activation_bytes(w, w.frames(plan.minutes), window)
        table.add_row(f"activations at their peak, cache {cache_name(window)}", _gib(size))
    table.add_row("usable memory of the GPU", _gib(plan.usable))
    for name, (ram, disk) in plan.quantizing().items():
        table.add_row(f"quantizing to {name}: memory", _gib(ram))
        table.add_row(f"quantizing to {name}: disk", _gib(disk))
    return table


def _cache(plan: Plan) -> Table:
    rows = plan.cache_over_time()
    table = _table("estimated cache, GiB of one video over time", "cache", *(clock(t) for t, _ in rows[0][1]))
    for name, sizes in rows:
        table.add_row(name, *(_gib(size) for _, size in sizes))
    return table


def _fits(plan: Plan) -> Table:
    columns = ("weights", "cache", "GiB needed", "fits", "longest video", "videos at a time")
    table = _table(f"what is expected to fit into {_gib(plan.usable)} GiB at {clock(plan.minutes)}", *columns)
    for fit in plan.fits():
        style = None if fit.fits else "dim"
        answer = "yes" if fit.fits else "no"
        table.add_row(fit.weights, fit.cache, _gib(fit.bytes), answer, _longest(fit), str(fit.videos), style=style)
    return table


def _longest(fit: Fit) -> str:
    if fit.minutes is None:
        return "any length"
    return "none" if not fit.minutes else clock(round(fit.minutes, 2))


def _speed(plan: Plan) -> Table:
    columns = ("arithmetic", "moment", "keys", "seconds per chunk", "frames/s", f"real time ({plan.workload.fps}/s)")
    table = _table("expected speed (ranges, not measurements)", *columns)
    for speed in plan.speeds():
        numbers = (_range(speed.seconds), _range(speed.fps), real_time(speed.fps, plan.workload.fps))
        table.add_row(speed.arithmetic, speed.moment, str(speed.keys), *numbers)
    return table


def _gains(plan: Plan) -> Iterator[str]:
    for moment, (low, high) in plan.gains():
        yield f"{moment}: {low:.2f}x to {high:.2f}x" + (" (none is possible)" if high < 1.02 else "")
