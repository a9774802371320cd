"""The picture of a run: one panel per case, one bar per contestant, speed over bf16 eager with quartiles."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fxq.bench.contest import BF16, CaseResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _FLOAT, _RIVAL, _INK, _LINE = "#c8553d", "#9aa5b1", "#4a6fa5", "#2b2d30", "#d9dde2"
_STYLE: dict[Any, object] = {
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _LINE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
}
COLUMNS = 3
FORMATS = (".png", ".svg", ".pdf")


def _colour(name: str, ours: bool) -> str:
    return _OURS if ours else _FLOAT if name.startswith(("fp32", "bf16")) else _RIVAL


def _panel(axes: Axes, case: CaseResult, names: Sequence[str], top: float) -> None:
    results = {result.name: result for result in case.results}
    for y, name in enumerate(names):
        ratio, result = case.ratio(name, BF16), results.get(name)
        if ratio is None or result is None:
            why = result.status if result is not None else "not run"
            axes.text(top * 0.01, y, why, va="center", style="italic", size=8.5)
            continue
        spread = [[max(0.0, ratio.median - ratio.low)], [max(0.0, ratio.high - ratio.median)]]
        axes.barh(y, ratio.median, 0.7, color=_colour(name, result.ours))
        axes.errorbar([ratio.median], [y], xerr=spread, fmt="none", ecolor=_INK, elinewidth=1, capsize=2)
        back = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.text(ratio.high + top * 0.02, y, f"{ratio.median:.2f}", va="center", size=8.5, bbox=back)
    axes.axvline(1, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, top * 1.16), ylim=(len(names) - 0.4, -0.6))
    axes.set_title(case.name, fontsize=10.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelbottom=True)
    axes.grid(axis="x", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def write_plot(cases: Sequence[CaseResult], path: pathlib.Path, note: str) -> pathlib.Path:
    """Draw the ratios to bf16 eager.

    Args:
        cases: of one level; skipped contestants get no row.
        path: ends in one of ``FORMATS``.
        note: conditions, shown under the panels.

    """
    from matplotlib import rc_context  # slow to import, and every command of fxq would
    from matplotlib.figure import Figure

    shown = (result.name for case in cases for result in case.results if result.status != "skipped")
    names = list(dict.fromkeys(shown))
    tops = [ratio.high for case in cases for name in names if (ratio := case.ratio(name, BF16)) is not None]
    columns = min(COLUMNS, len(cases))
    rows = math.ceil(len(cases) / columns)
    with rc_context(_STYLE):
        figure = Figure(figsize=(2.2 + 3.3 * columns, 0.9 + rows * (0.7 + 0.25 * len(names))), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, case in zip(grid, cases, strict=False):
            _panel(axes, case, names, max([*tops, 1.0]))
        for axes in grid[len(cases) :]:
            axes.set_visible(False)
        figure.supxlabel(f"speed over {BF16}, median and quartiles; {note}", size=9.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return path
