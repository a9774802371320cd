"""A rollout on a cache policy as one HTML page: memory, drift and the cost of encoding, chunk by chunk."""

from __future__ import annotations

import datetime
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from fxq.metrics.cache_run import CacheRun
from fxq.metrics.latents import Floats, bootstrap
from fxq.report.charts import INK, LINE, MUTED, NARROW, SERIES, STYLE, WIDE, inline, new_figure, place_axes
from fxq.report.html import flat_facts, page_template
from fxq.report.tables import plain, significant
from fxq.runtime.writable import whole_file

_BEST = 100.0
"""PSNR in dB of what is equal."""


def decibels(run: CacheRun) -> Floats:
    """PSNR of each chunk of each video, float64 [V, chunks]; the peak is the spread of the float model's latents."""
    peak = max(run.largest, 1e-30) ** 2
    return np.minimum(10 * np.log10(peak / np.maximum(run.mse, 1e-300)), _BEST)


def cache_to_json(run: CacheRun) -> dict[str, object]:
    """The numbers of a run, in types that ``json.dumps`` takes."""
    result: dict[str, object] = plain(run)
    result["psnr_by_chunk"] = plain(decibels(run).mean(0))
    return result


def sentences(run: CacheRun) -> list[tuple[str, str]]:
    """What the page says first: memory, drift and commit in a line each."""
    held, without = run.exact[-1] + run.packed[-1], run.plain[-1]
    found = decibels(run).mean(0)
    worst = int(found.argmin())
    share = sum(run.commit) / max(sum(run.seconds), 1e-30)
    most = int(np.argmax(run.commit))
    part = held / max(without, 1)
    memory = f"{_bytes(held)} after {len(run.exact)} chunks, {part:.2f} of the {_bytes(without)} without codecs."
    drift = f"{found[-1]:.1f} dB in the last chunk, least {found[worst]:.1f} dB in chunk {worst + 1}."
    if not run.mse.any():
        drift = "None: latents are those of the float model on exact caches."
    names = [n for n in run.scores if n in run.reference_scores]
    if names:
        means = [f"{n} {np.mean(run.scores[n]):.3f} (float {np.mean(run.reference_scores[n]):.3f})" for n in names]
        drift += f" Scores, mean over chunks: {', '.join(means)}."
    commit = (
        f"{share:.1%} of the time; chunk {most + 1} most, {run.commit[most] / max(run.seconds[most], 1e-30):.1%} of it."
    )
    return [("Memory", memory), ("Drift", drift), ("Commit", commit)]


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{significant(count / size)} {unit}"
    return f"{int(count)} B"


def _chart(width: int, label: str, draw: Callable[[Axes, Any], None], ylabel: str) -> Markup:
    """Axes over chunks with a legend above them."""
    with matplotlib.rc_context(STYLE):
        figure: Figure = new_figure(width, 270)
        axes = place_axes(figure, 62, 6, 30, 42)
        draw(axes, figure)
        axes.set(xlabel="chunk", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            size = 11.5 if width > 500 else 10
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, fontsize=size, columnspacing=1.2)
        return inline(figure, label)


def memory_chart(run: CacheRun, width: int) -> Markup:
    """Bytes after each chunk: exact tokens, encoded spans on top of them, and what there would be without codecs."""
    most = max((*run.plain, *(e + p for e, p in zip(run.exact, run.packed, strict=True))))
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= s), ("B", 1.0))
    x = np.arange(len(run.exact)) + 1

    def draw(axes: Axes, _: object) -> None:
        exact, packed = np.array(run.exact) / size, np.array(run.packed) / size
        axes.bar(x, exact, 0.8, color=SERIES[0], label="exact")
        axes.bar(x, packed, 0.8, bottom=exact, color=SERIES[1], label="encoded")
        axes.plot(x, np.array(run.plain) / size, "--", color=INK, linewidth=1.4, label="without codecs")
        axes.set(xlim=(0.4, len(x) + 0.6), ylim=(0, 1.05 * most / size))

    return _chart(width, "Bytes of the cache after each chunk", draw, unit)


def drift_chart(run: CacheRun, width: int) -> Markup:
    """Mean squared error of each chunk, log axis."""
    x, mean = np.arange(run.mse.shape[1]) + 1, run.mse.mean(0)
    low, high = bootstrap(run.mse)
    shown = mean > 0

    def draw(axes: Axes, figure: Figure) -> None:
        if not shown.any():
            figure.text(0.5, 0.5, "no difference in any chunk", ha="center", color=MUTED)
            axes.set(xlim=(0.5, len(x) + 0.5), ylim=(0, 1))
            axes.set_yticks([])
            return
        axes.fill_between(
            x[shown], np.maximum(low[shown], 1e-30), high[shown], color=SERIES[0], alpha=0.18, linewidth=0
        )
        axes.plot(x[shown], mean[shown], "-o", color=SERIES[0], linewidth=1.8, markersize=3.5)
        axes.set(yscale="log", xlim=(0.5, len(x) + 0.5))
        few = float(np.log10(high[shown].max() / mean[shown].min())) < 2
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))

    return _chart(width, "Latent MSE of each chunk", draw, "latent MSE")


def scores_chart(run: CacheRun, width: int) -> Markup:
    """Scores of each chunk, and the float model's."""

    def draw(axes: Axes, _: object) -> None:
        for i, (name, values) in enumerate(run.scores.items()):
            x, colour = np.arange(len(values)) + 1, SERIES[i % len(SERIES)]
            axes.plot(x, values, "-o", color=colour, linewidth=1.6, markersize=3.5, label=name.replace("_", " "))
            axes.plot(x, run.reference_scores[name], ":", color=colour, linewidth=1.4)
        axes.set_ylim(-0.03, 1.03)

    return _chart(width, "Scores of each chunk", draw, "score")


def commit_chart(run: CacheRun, width: int) -> Markup:
    """Share of each chunk's time that encoding takes."""
    share = 100 * np.array(run.commit) / np.maximum(np.array(run.seconds), 1e-30)

    def draw(axes: Axes, _: object) -> None:
        axes.bar(np.arange(len(share)) + 1, share, 0.8, color=SERIES[2])
        axes.set(xlim=(0.4, len(share) + 0.6), ylim=(0, max(1.0, 1.1 * float(share.max()))))

    return _chart(width, "Share of a chunk's time that encoding takes", draw, "% of the chunk")


def render(run: CacheRun, title: str, command: str, environment: Mapping[str, str]) -> str:
    """The page as text."""

    def both(draw: Callable[[CacheRun, int], Markup]) -> dict[str, Markup]:
        return {"wide": draw(run, WIDE), "narrow": draw(run, NARROW)}

    found, names = decibels(run).mean(0), list(run.scores)
    columns = ["chunk", "exact", "encoded", "without codecs", "MSE", "PSNR dB", *names, "commit ms", "chunk s"]
    rows = [
        [
            str(i + 1),
            *(_bytes(part[i]) for part in (run.exact, run.packed, run.plain)),
            significant(float(run.mse[:, i].mean())),
            f"{found[i]:.1f}",
            *(f"{run.scores[name][i]:.3f}" for name in names),
            significant(1000 * run.commit[i]),
            significant(run.seconds[i]),
        ]
        for i in range(len(run.exact))
    ]
    videos = len(run.mse)
    context = {
        "title": title,
        "sentences": sentences(run),
        "policy": [(name, value) for name, value in flat_facts(run.policy) if value != "None"],
        "environment": flat_facts(environment),
        "command": command,
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "videos": "one video" if videos == 1 else f"{videos} videos",
        "memory": both(memory_chart),
        "drift": both(drift_chart),
        "scores": both(scores_chart) if run.scores else None,
        "commit": both(commit_chart),
        "columns": [name.replace("_", " ") for name in columns],
        "rows": rows,
    }
    return page_template("cache.html.j2").render(context)


def write_cache_report(
    run: CacheRun, path: str | os.PathLike[str], title: str, command: str, environment: Mapping[str, str]
) -> pathlib.Path:
    """Write the page, whole or not at all; returns its path.

    Raises:
        OSError: when it cannot be written.
    """
    out = pathlib.Path(path)
    text = render(run, title, command, environment)
    with whole_file(out) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
    return out
