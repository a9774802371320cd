"""The results as a page with its videos beside it, and all files of a comparison of bundles."""

from __future__ import annotations

import json
import math
import pathlib

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fxq.comparison.bundles import tables
from fxq.comparison.bundles.results import BundleResults, Floats
from fxq.report.charts import INK, LINE, NARROW, SERIES, STYLE, WIDE, inline, new_figure, place_axes
from fxq.report.html import flat_facts, page_template
from fxq.runtime.writable import whole_file

PAGE = "compare.html"


def _chart(results: BundleResults, width: int) -> Markup:
    """PSNR of each chunk, forced and free: mean over videos, and the band from the worst to the best."""
    with matplotlib.rc_context(STYLE):
        return inline(_figure(results, width), "PSNR of each chunk")


def _figure(results: BundleResults, width: int) -> Figure:
    narrow = width < 500
    entries = {
        row.name: Line2D([], [], color=SERIES[i % len(SERIES)], linewidth=2) for i, row in enumerate(results.rows)
    }
    columns = max(1, int(width // (46 + 6.4 * max(map(len, entries)))))
    top, panel, gap = 22 + 17 * math.ceil(len(entries) / columns), 200, 62
    height = top + 14 + (2 * panel + gap if narrow else panel) + 44
    figure = new_figure(width, height)
    figure.legend(
        list(entries.values()), list(entries), loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=columns, fontsize=10.5
    )
    for i, (title, name) in enumerate((("from full precision's history", "forced"), ("its own videos", "free"))):
        if narrow:
            axes = place_axes(figure, 46, 8, top + 14 + i * (panel + gap), 44 + (1 - i) * (panel + gap))
        else:
            axes = place_axes(figure, 46 + i * width / 2, 8 + (1 - i) * width / 2, top + 14, 44)
        for j, row in enumerate(results.rows):
            values: Floats = getattr(row, name)
            x = np.arange(values.shape[1]) + 1
            colour = SERIES[j % len(SERIES)]
            axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
            axes.plot(
                x, values.mean(0), color=colour, linewidth=1.8, marker="o" if len(x) <= 12 else "", markersize=3.5
            )
        axes.set(xlabel="chunk", xlim=(0.7, results.chunks + 0.3))
        axes.set_title(f"{title}, PSNR in dB", loc="left", fontsize=11.5, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def render(results: BundleResults) -> str:
    """The page as text; its videos are files beside it, and it needs no network."""
    shown = tables.columns(results)
    clips = [
        {"path": path, "prompt": prompt, "number": i + 1, "moves": path.endswith(".mp4")}
        for i, (path, prompt) in enumerate(zip(results.clips, results.prompts, strict=False))
    ]
    context = {
        "results": results,
        "sentences": tables.sentences(results),
        "about": tables.about(results),
        "lacking": tables.lacking(results),
        "columns": shown,
        "rows": [{"name": row.name, "bits": row.bits, "cells": [c.text(row) for c in shown]} for row in results.rows],
        "chart": {"wide": _chart(results, WIDE), "narrow": _chart(results, NARROW)},
        "clips": clips,
        "markdown": tables.markdown_table(results),
        "settings": flat_facts({key: value for key, value in results.settings.items() if value is not None}),
        "environment": flat_facts(results.environment),
    }
    return page_template("bundles.html.j2").render(context)


def write(results: BundleResults, folder: pathlib.Path) -> list[pathlib.Path]:
    """Write page, Markdown, CSV and JSON beside the videos, each whole or not at all, and return their paths.

    Raises:
        OSError: when one cannot be written.
    """
    texts = {
        PAGE: render(results),
        "compare.md": tables.to_markdown(results),
        "chunks.csv": tables.chunks_to_csv(results),
        "compare.json": json.dumps(tables.to_json(results), indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        with whole_file(folder / name) as part:
            part.write_text(text, encoding="utf-8", newline="\n")
    return [folder / name for name in texts]
