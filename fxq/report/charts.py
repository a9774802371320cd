"""Charts as inline SVG whose colours and font are the page's own, so they follow its light or dark scheme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from fxq.metrics.latents import bootstrap
from fxq.report.data import PUBLISHED_SENSITIVITY, Comparison, LayerView, SensitivityView, Variant
from fxq.report.verdict import bit_widths, metric_name, outcome, ratio_text

# Placeholder colours: matplotlib draws with them, inline turns them into CSS variables.
INK, MUTED, LINE, GOOD, BAD = "#fe0101", "#fe0202", "#fe0303", "#fe0404", "#fe0505"
SERIES = tuple(f"#fe06{i:02}" for i in range(1, 9))
OUTLIER, PAGE = "#fe0701", "#fe0801"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    GOOD: "--good",
    BAD: "--bad",
    **{colour: f"--series-{i + 1}" for i, colour in enumerate(SERIES)},
    OUTLIER: "--outlier",
    PAGE: "--page",
}
WIDE, NARROW = 760, 350
STYLE: dict[Any, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fxq",
    "text.parse_math": False,
    "font.size": 11.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 1.0,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_LIMITS = (1e-4, 1e4)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in units of the drawing."""
    return Figure(figsize=(width / 72, height / 72), facecolor="none")


def place_axes(figure: Figure, left: float, right: float, top: float, bottom: float) -> Axes:
    """Axes with margins in units of the drawing."""
    width, height = figure.get_size_inches() * 72
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    axes.set_facecolor("none")
    return axes


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def inline(figure: Figure, label: str) -> Markup:
    """The figure as an <svg> element with short numbers, no ids that nothing refers to, and CSS variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]+)"', text)
    assert view_box is not None
    width = view_box[1].split()[2]
    head = f'<svg viewBox="{view_box[1]}" style="max-width: {width}px" role="img" aria-label="{escape(label)}">'
    text = head + text[text.index(">") + 1 :]
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"<[^>]+>", lambda m: re.sub(r"-?\d+\.\d{3,}", _short, m[0]), text)
    text = re.sub(r"#fe0[0-9a-f]{3}", lambda m: f"var({VARIABLES[m[0]]})", text)
    text = re.sub(r" ?transform=\"rotate\(-?0(?:\.0)? [^\"]*\"|<g>\s*</g>|<!--.*?-->", "", text)
    return Markup(re.sub(r"\n\s*", "\n", text))


def series(bits: Sequence[str]) -> dict[str, str]:
    """Colour of each bit width."""
    return {name: SERIES[i % len(SERIES)] for i, name in enumerate(dict.fromkeys(bits))}


def _ratio_ticks(low: float, high: float, length: float, gap: float = 34) -> list[float]:
    """Round numbers for a log axis ``length`` long, at least ``gap`` apart: 1 first, then the rounder ones."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**e for e in sorted(exponents, key=abs)]
    factors = ((1.0,), (0.5, 2.0), (0.3, 3.0), (0.7, 1.5), (0.8, 1.2))
    candidates = [decade * factor for group in factors for decade in decades for factor in group]
    scale = length / math.log(high / low)
    ticks: list[float] = []
    for tick in [*candidates, 0.9, 1.1, 0.95, 1.05]:
        if low <= tick <= high and all(abs(math.log(tick / t)) * scale >= gap for t in ticks):
            ticks.append(tick)
    return sorted(ticks)


def forest(comparisons: Sequence[Comparison], width: int) -> Markup:
    """Ratios with their intervals on a log axis, a line at 1; grouped by metric."""
    with matplotlib.rc_context(STYLE):
        return _forest(comparisons, width)


def _forest(comparisons: Sequence[Comparison], width: int) -> Markup:
    narrow = width < 500
    several_bits = len({c.bits for c in comparisons}) > 1
    several_pairs = len({(c.a, c.b) for c in comparisons}) > 1

    def label(c: Comparison) -> str:
        pair = f"{c.a} / {c.b}"
        return " ".join([c.bits] * (several_bits or not several_pairs) + [pair] * several_pairs)

    rows: list[Comparison | str] = []
    for metric in dict.fromkeys(c.metric for c in comparisons):
        rows += [metric_name(metric), *(c for c in comparisons if c.metric == metric)]
    pitch = 40 if narrow and several_pairs else 26
    longest = max(len(label(c)) for c in comparisons)
    left = 12 if narrow and several_pairs else 30 + longest * 6.1
    right = 12 if narrow and several_pairs else 128
    height = 48 + pitch * len(rows)
    figure = new_figure(width, height)
    axes = place_axes(figure, left, right, 6, 42)
    bounds = [float(np.clip(x, *_LIMITS)) for c in comparisons for x in (c.low, c.high, c.ratio) if math.isfinite(x)]
    low, high = min([*bounds, 1.0]), max([*bounds, 1.0])
    low, high = (max(low, _LIMITS[0]), min(high, _LIMITS[1]))
    pad = max((high / low) ** 0.06, 1.03)
    axes.set(xscale="log", xlim=(low / pad, high * pad), ylim=(len(rows) - 0.5, -0.5))
    axes.axvline(1, color=MUTED, linewidth=1.2)
    aside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    for y, row in enumerate(rows):
        if isinstance(row, str):
            axes.annotate(row, (0, y), (-left + 2, 0), ha="left", weight="bold", **aside)  # type: ignore[arg-type]
            continue
        kind = outcome(row)
        colour = {"lower": GOOD, "higher": BAD, "unresolved": MUTED}[kind]
        ends = np.clip([row.low, row.high], *_LIMITS)
        axes.plot(ends, [y, y], color=colour, linewidth=2.4, solid_capstyle="butt")
        axes.plot([np.clip(row.ratio, *_LIMITS)], [y], "s", color=colour, markersize=6.5)
        text = f"{ratio_text(row.ratio)} ({ratio_text(row.low)}\N{EN DASH}{ratio_text(row.high)})"
        if narrow and several_pairs:
            line = f"{label(row)}  {text}"
            back = {"facecolor": PAGE, "edgecolor": "none", "pad": 1}
            axes.annotate(line, (0, y - 0.45), (-left + 2, 0), ha="left", size=10, bbox=back, zorder=5, **aside)  # type: ignore[arg-type]
        else:
            axes.annotate(label(row), (0, y), (-left + 14, 0), ha="left", **aside)  # type: ignore[arg-type]
            axes.annotate(text, (1, y), (right - 2, 0), ha="right", **aside)  # type: ignore[arg-type]
    axes.xaxis.set_major_locator(FixedLocator(_ratio_ticks(low / pad, high * pad, width - left - right)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    pairs = dict.fromkeys(f"{c.a} / {c.b}" for c in comparisons)
    axes.set_xlabel(f"error ratio, {next(iter(pairs))}" if len(pairs) == 1 else "error ratio")
    return inline(figure, "Forest plot of paired error ratios with 95 % intervals")


def sensitivity(views: Sequence[SensitivityView], width: int) -> Markup:
    """Chunk sensitivities as bars with intervals, the published curve as diamonds."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width, 280 if width > 500 else 250)
        axes = place_axes(figure, 40, 4, 10, 42)
        colours = series([v.bits for v in views])
        share = 0.8 / max(1, len(views))
        for i, view in enumerate(views):
            x = np.arange(len(view.alpha)) + 1 - 0.4 + share * (i + 0.5)
            alpha = np.array(view.alpha)
            axes.bar(x, alpha, share * 0.9, color=colours[view.bits], label=f"{view.bits}, measured here")
            spread = np.maximum(np.stack([alpha - view.low, np.array(view.high) - alpha]), 0)
            axes.errorbar(x, alpha, spread, fmt="none", ecolor=INK, elinewidth=1, capsize=1.6, capthick=1)
        chunks = np.arange(len(PUBLISHED_SENSITIVITY)) + 1
        axes.plot(chunks, PUBLISHED_SENSITIVITY, "--D", color=INK, linewidth=1, markersize=4.5, label="W4A8, published")
        count = max([len(PUBLISHED_SENSITIVITY), *(len(v.alpha) for v in views)])
        axes.set(xlim=(0.4, count + 0.6), xlabel="chunk", ylabel="share of total error")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=count + 1))
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(loc="upper right", fontsize=11.5 if width > 500 else 10.5)
        return inline(figure, "Sensitivity of each chunk, measured and published")


def chunk_errors(variants: Sequence[Variant], width: int) -> Markup:
    """Latent MSE of each chunk by variant, mean over videos with 95 % bands, log axis."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width, 300)
        axes = place_axes(figure, 62, 4, 12 + 18 * math.ceil(len(variants) / (3 if width > 500 else 2)), 42)
        colours = series([v.bits for v in variants])
        for group in bit_widths(variants).values():
            for i, v in enumerate(group):
                mean = np.maximum(v.chunk_mse.mean(0), 1e-12)
                low, high = (np.maximum(b, 1e-12) for b in bootstrap(v.chunk_mse))
                x = np.arange(len(mean)) + 1
                line = "-" if i == len(group) - 1 else (0, (4, 2 + 2 * i))
                axes.fill_between(x, low, high, color=colours[v.bits], alpha=0.15, linewidth=0)
                name = f"{v.method} {v.bits}"
                axes.plot(x, mean, color=colours[v.bits], linestyle=line, linewidth=1.8, label=name)
        axes.set(yscale="log", xlabel="chunk", ylabel="latent MSE")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=3 if width > 500 else 2,
            fontsize=11.5 if width > 500 else 10.5,
            handlelength=2.2,
            columnspacing=1.4,
        )
        return inline(figure, "Latent MSE of each chunk by variant")


def outlier_curve(view: LayerView, top: float) -> Markup:
    """Input-channel norms of one layer over their median, descending, with the outlier region shaded.

    Args:
        view: a layer with norms.
        top: upper end of the axis, in medians.
    """
    assert view.norms is not None
    unit = view.median or 1.0
    norms = view.norms / unit
    with matplotlib.rc_context(STYLE | {"font.size": 10}):
        figure = new_figure(230, 108)
        axes = place_axes(figure, 24, 2, 6, 18)
        x = np.arange(len(norms)) + 1
        if view.outliers:
            axes.axvspan(0.5, view.outliers + 0.5, color=OUTLIER, alpha=0.16, linewidth=0)
            axes.axvspan(0.5, min(view.raw_outliers, view.outliers) + 0.5, color=OUTLIER, alpha=0.22, linewidth=0)
        axes.axhline(1, color=MUTED, linewidth=0.9)
        if 0 < view.threshold / unit <= top:
            axes.axhline(view.threshold / unit, color=OUTLIER, linewidth=1.1, dashes=(4, 2))
        axes.plot(x, norms, color=INK, linewidth=1.5)
        axes.set(xlim=(0.5, len(norms) + 0.5), ylim=(0, top))
        axes.xaxis.set_major_locator(FixedLocator([1, len(norms)]))
        axes.yaxis.set_major_locator(FixedLocator([0, 1, math.floor(top)] if math.floor(top) > 1 else [0, 1]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        first, last = axes.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
        axes.tick_params(length=0, pad=3)
        return inline(figure, f"Channel norms of {view.layer}")
