"""The results as one HTML page that needs no network, and all files of a comparison."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable

from markupsafe import Markup

from fxq.comparison import charts, tables
from fxq.comparison.results import Results
from fxq.report.charts import NARROW, WIDE, forest
from fxq.report.html import flat_facts, page_template
from fxq.runtime.writable import whole_file

_LAST = 1e308
"""Sorts what is not known behind everything else."""

PICTURES = {"pareto.png": charts.pareto, "drift.png": charts.drift}


def _both(draw: Callable[[int], Markup]) -> dict[str, Markup]:
    return {"wide": draw(WIDE), "narrow": draw(NARROW)}


def _rows(results: Results) -> list[dict[str, object]]:
    """Cells of the table: what is shown, what stands below it, and what a click on the heading sorts by."""
    columns = tables.short_columns(results)
    marks = [tables.best(results, column) for column in columns]
    found: list[dict[str, object]] = []
    previous = None
    for i, row in enumerate(results.rows):
        cells = []
        for column, marked in zip(columns, marks, strict=True):
            value = column.value(row)
            sort = _LAST if math.isnan(value) else value
            text = column.shown(value)
            cells.append({"text": text, "below": column.below(row), "sort": sort, "best": i in marked})
        v = row.variant
        found.append({"method": v.method, "bits": v.bits, "cells": cells, "start": v.bits != previous})
        previous = v.bits
    return found


def render(results: Results) -> str:
    """The page as text."""
    context = {
        "results": results,
        "sentences": tables.sentences(results),
        "settings": flat_facts({k: v for k, v in results.settings.items() if v is not None}),
        "environment": flat_facts(results.environment),
        "videos": len(results.rows[0].variant.psnr),
        "columns": tables.short_columns(results),
        "full_precision": tables.full_precision_cells(tables.short_columns(results)),
        "rows": _rows(results),
        "pareto": _both(lambda width: charts.as_svg(charts.pareto, results, width, "Size against error")),
        "drift": _both(lambda width: charts.as_svg(charts.drift, results, width, "Latent MSE of each chunk")),
        "forest": _both(lambda width: forest(results.comparisons, width)) if results.comparisons else None,
        "reliability": tables.reliability_rows(results),
        "reliability_names": tables.RELIABILITY,
    }
    return page_template("compare.html.j2").render(context)


def write(results: Results, folder: pathlib.Path) -> list[pathlib.Path]:
    """Write page, Markdown, CSV, JSON and pictures, each whole or not at all, and return their paths.

    Raises:
        OSError: when one cannot be written.
    """
    texts = {
        "compare.html": render(results),
        "compare.md": tables.to_markdown(results, list(PICTURES)),
        "compare.csv": tables.to_csv(results),
        "chunks.csv": tables.chunks_to_csv(results),
        "compare.json": json.dumps(tables.to_json(results), indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        with whole_file(folder / name) as part:
            part.write_text(text, encoding="utf-8", newline="\n")
    for name, draw in PICTURES.items():
        charts.as_png(draw, results, folder / name)
    return [folder / name for name in (*texts, *PICTURES)]
