"""The drawings of a comparison: size against error, and the error of each chunk; as SVG for the page, and as PNG."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from fxq.comparison.results import ERRORS, Results, Row
from fxq.metrics.latents import Floats, bootstrap
from fxq.report.charts import INK, LINE, MUTED, PAGE, SERIES, STYLE, VARIABLES, WIDE, inline, new_figure, place_axes
from fxq.report.data import Variant
from fxq.report.verdict import metric_name
from fxq.runtime.writable import whole_file

Paint = Callable[[str], str]
"""From a colour's placeholder to what is drawn with."""

_MARKERS = "osD^vPX*"
_LEAST = 1e-15


def _light() -> dict[str, str]:
    """The page's own light colours by placeholder."""
    css = importlib.resources.files("fxq.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    values = dict(re.findall(r"(--[\w-]+): (#\w+);", css[: css.index("}")]))
    return {placeholder: values[name] for placeholder, name in VARIABLES.items()}


def as_svg(draw: Callable[[Results, int, Paint], Figure], results: Results, width: int, label: str) -> Markup:
    """A drawing in the page's colours."""
    with matplotlib.rc_context(STYLE):
        return inline(draw(results, width, lambda colour: colour), label)


def as_png(draw: Callable[[Results, int, Paint], Figure], results: Results, path: pathlib.Path) -> pathlib.Path:
    """Write a drawing as PNG, in the page's light colours, whole or not at all.

    Raises:
        OSError: when it cannot be written.
    """
    colours = _light()
    style: dict[Any, object] = {
        key: colours.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()
    }
    with matplotlib.rc_context(style):
        figure = draw(results, WIDE, colours.__getitem__)
        with whole_file(path) as part:
            figure.savefig(part, format="png", dpi=144, facecolor=colours[PAGE])
    return path


@dataclasses.dataclass(frozen=True)
class Look:
    """How a method is drawn: a placeholder colour; ``hollow`` and with broken lines where its colour is taken."""

    colour: str
    hollow: bool = False

    @property
    def line(self) -> Literal["-", "--"]:
        """Style of its lines."""
        return "--" if self.hollow else "-"


def method_looks(rows: Sequence[Row]) -> dict[str, Look]:
    """A look for each method, no two alike up to twice the number of colours."""
    names = dict.fromkeys(row.variant.method for row in rows)
    return {name: Look(SERIES[i % len(SERIES)], bool(i // len(SERIES) % 2)) for i, name in enumerate(names)}


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (size, error) points that no other is better than in both, by size."""
    kept: list[tuple[float, float]] = []
    for size, error in sorted(points):
        if not kept or error < kept[-1][1]:
            kept.append((size, error))
    return kept


def geometric(errors: Floats) -> tuple[Floats, Floats, Floats]:
    """Geometric mean over videos [V, ...] with its 95 % bootstrap interval: as paired ratios are made of."""
    logs = np.log(np.maximum(errors, _LEAST))
    low, high = bootstrap(logs)
    return np.exp(logs.mean(0)), np.exp(low), np.exp(high)


def side_by_side(sizes: Sequence[float], near: float, step: float) -> list[float]:
    """Where to draw points so that those of about one size, ``near`` by each other, lie ``step`` apart."""
    drawn = list(sizes)
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    while order:
        cluster = [i for i in order if sizes[i] - sizes[order[0]] <= near]
        middle = float(np.mean([sizes[i] for i in cluster]))
        for place, i in enumerate(cluster):
            drawn[i] = middle + (place - (len(cluster) - 1) / 2) * step
        order = order[len(cluster) :]
    return drawn


def _legend(figure: Figure, entries: Mapping[str, Line2D], width: int, top: float) -> None:
    """Entries in as many columns as fit, in the upper ``top`` of the figure."""
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="upper left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=_columns(entries, width),
        fontsize=10.5,
        handlelength=1.6,
        columnspacing=1.4,
        borderaxespad=0.3,
    )


def _columns(names: Mapping[str, Line2D], width: int) -> int:
    return max(1, int(width // (40 + 6.2 * max(map(len, names)))))


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A log axis from below the least to above the largest value, with more numbers the shorter it is."""
    known = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    low, high = min(known), max(known)
    pad = max((high / low) ** 0.08, 1.15)
    axes.set(yscale="log", ylim=(low / pad, high * pad))
    span = high / low
    subs = (1.0,) if span > 300 else (1.0, 2.0, 5.0) if span > 5 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{y:.1e}".replace(".0e", "e").replace("e-0", "e-") if y < 1e-3 else f"{y:g}")
    )
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))


def pareto(results: Results, width: int, paint: Paint) -> Figure:
    """Size against both errors: a colour for each method, a shape for each width, the best of each size joined."""
    narrow = width < 500
    looks = method_looks(results.rows)
    shapes = {b: _MARKERS[i % len(_MARKERS)] for i, b in enumerate(dict.fromkeys(v.bits for v in results.variants))}

    entries = {name: _key(look, paint) for name, look in looks.items()}
    for bits, shape in shapes.items():
        entries[bits] = Line2D([], [], color=paint(MUTED), marker=shape, linestyle="", markersize=7)
    entries["Pareto front"] = Line2D([], [], color=paint(MUTED), linewidth=1, linestyle="--")
    top = 22 + 17 * math.ceil(len(entries) / _columns(entries, width))
    panel, gap = 250, 66
    height = top + 14 + (2 * panel + gap if narrow else panel) + 44
    figure = new_figure(width, height)
    _legend(figure, entries, width, top)
    for i, metric in enumerate(ERRORS):
        if narrow:
            axes = place_axes(figure, 58, 8, top + 14 + i * (panel + gap), 44 + (1 - i) * (panel + gap))
        else:
            axes = place_axes(figure, 58 + i * width / 2, 8 + (1 - i) * width / 2, top + 14, 44)
        _pareto_panel(axes, results.variants, metric, looks, shapes, paint)
    return figure


def _pareto_panel(
    axes: Axes,
    variants: Sequence[Variant],
    metric: str,
    looks: Mapping[str, Look],
    shapes: Mapping[str, str],
    paint: Paint,
) -> None:
    sizes = [variant.whole_ratio for variant in variants]
    reach = max(max(sizes) - min(sizes), 0.02)
    by_bits = {bits: [i for i, v in enumerate(variants) if v.bits == bits] for bits in shapes}
    drawn = list(sizes)
    for members in by_bits.values():
        step = min(0.035, 0.12 / len(members)) * reach
        for i, x in zip(members, side_by_side([sizes[i] for i in members], 0.05 * reach, step), strict=True):
            drawn[i] = x
    values, points = [], {}
    for variant, size, x in zip(variants, sizes, drawn, strict=True):
        mean, low, high = (float(value) for value in geometric(getattr(variant, metric)))
        points[size, mean] = x
        values += [mean, low, high]
        look = looks[variant.method]
        colour, face = paint(look.colour), paint(PAGE if look.hollow else look.colour)
        axes.plot([x, x], [low, high], color=colour, linewidth=1.4, alpha=0.8)
        axes.plot(x, mean, shapes[variant.bits], color=colour, markerfacecolor=face, markersize=7, alpha=0.9, zorder=3)
    best = [(points[point], point[1]) for point in front(list(points))]
    axes.plot(*zip(*best, strict=True), color=paint(MUTED), linewidth=1, linestyle="--", zorder=1)
    axes.set(
        xlim=(min(drawn) - 0.08 * reach, max(drawn) + 0.08 * reach),
        xlabel="bytes of linears / bf16; equal sizes side by side",
    )
    axes.xaxis.set_major_locator(MaxNLocator(6))
    _log_axis(axes, values)
    axes.set_title(metric_name(metric), loc="left", fontsize=11.5, color=paint(INK))
    axes.grid(color=paint(LINE), linewidth=0.6)
    axes.set_axisbelow(True)


def _key(look: Look, paint: Paint) -> Line2D:
    """A method's entry in the legend."""
    face = paint(PAGE if look.hollow else look.colour)
    return Line2D([], [], color=paint(look.colour), marker="s", linestyle="", markersize=8, markerfacecolor=face)


def drift(results: Results, width: int, paint: Paint) -> Figure:
    """Latent MSE of each chunk in free rollouts, a panel for each width, geometric mean over videos, 95 % bands."""
    looks = method_looks(results.rows)
    groups: dict[str, list[Variant]] = {}
    for variant in results.variants:
        groups.setdefault(variant.bits, []).append(variant)
    entries = {
        name: Line2D([], [], color=paint(look.colour), linewidth=2, linestyle=look.line) for name, look in looks.items()
    }
    columns = 1 if width < 500 else min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    top = 22 + 17 * math.ceil(len(entries) / _columns(entries, width))
    panel, gap = 190, 62
    height = top + rows * (panel + gap)
    figure = new_figure(width, height)
    _legend(figure, entries, width, top)
    for i, (bits, group) in enumerate(groups.items()):
        row, column = divmod(i, columns)
        left, above = column * width / columns, top + 14 + row * (panel + gap)
        axes = place_axes(figure, 58 + left, width - (column + 1) * width / columns + 8, above, height - above - panel)
        seen: list[float] = []
        for v in group:
            mean, low, high = geometric(v.chunk_mse)
            seen += [*low.tolist(), *high.tolist()]
            x = np.arange(len(mean)) + 1
            look = looks[v.method]
            colour = paint(look.colour)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            marker = "o" if len(mean) <= 12 else ""
            axes.plot(x, mean, color=colour, linewidth=1.8, linestyle=look.line, marker=marker, markersize=3.5)
        _log_axis(axes, seen)
        axes.set(xlabel="chunk", xlim=(0.7, results.chunks + 0.3))
        axes.set_title(f"{bits}, latent MSE", loc="left", fontsize=11.5, color=paint(INK))
        if results.chunks > results.trained:
            axes.axvline(results.trained + 0.5, color=paint(MUTED), linewidth=1, linestyle=":")
            axes.annotate(
                "longer than trained",
                (results.trained + 0.5, 1),
                (4, -1),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                size=9.5,
                color=paint(MUTED),
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=paint(LINE), linewidth=0.6)
        axes.set_axisbelow(True)
    return figure
