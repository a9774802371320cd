"""A report as one HTML file that needs no network."""

from __future__ import annotations

import base64
import datetime
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fxq.report import charts
from fxq.report.data import Clip, Comparison, LayerView, Report, Running, Variant
from fxq.report.tables import best_marks, mean_interval, plain, score_names, significant
from fxq.report.verdict import ablation_sentence, bit_widths, headline, interval_text, metric_name, outcome, verdict
from fxq.runtime.writable import whole_file

_SHEET_WIDTH = 8192
_NONE = "\N{EN DASH}"


def _sheet(frames: NDArray[np.uint8]) -> tuple[str, int]:
    """All frames [F, H, W, 3] in one PNG as a data URL, and how many stand in a row."""
    count, height, width, _ = frames.shape
    columns = max(1, min(count, _SHEET_WIDTH // width))
    rows = math.ceil(count / columns)
    padded = np.zeros((rows * columns, height, width, 3), np.uint8)
    padded[:count] = frames
    grid = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    buffer = io.BytesIO()
    Image.fromarray(grid.reshape(rows * height, columns * width, 3)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), columns


def _clip(clip: Clip) -> dict[str, object]:
    reference, *others = clip.frames
    count, height, width, _ = clip.frames[reference].shape
    sheets = {name: _sheet(frames) for name, frames in clip.frames.items()}
    return {
        "prompt": clip.prompt,
        "count": count,
        "width": width,
        "height": height,
        "columns": sheets[reference][1],
        "reference": reference,
        "versions": others or [reference],
        "sheets": {name: sheet for name, (sheet, _) in sheets.items()},
        "errors": plain(clip.chunk_mse),
    }


def _cell(text: str, below: str = "", sort: float | str | None = None, best: bool = False) -> dict[str, object]:
    return {"text": text, "below": below, "sort": text if sort is None else sort, "best": best}


def _exponent(variants: Sequence[Variant], name: str) -> int:
    """A power of ten, a multiple of 3, that leaves the median of a column between 1 and 1000."""
    middle = float(np.median([getattr(v, name).mean() for v in variants if len(v.psnr)] or [1.0]))
    if not 0 < middle < 1:
        return 0
    return 3 * math.floor(math.log10(middle) / 3)


def _measured(values: NDArray[np.float64], exponent: int, best: bool) -> dict[str, object]:
    mean, low, high = (x / 10.0**exponent for x in mean_interval(values))
    below = f"{significant(low)} to {significant(high)}"
    return _cell(significant(mean), below, mean if math.isfinite(mean) else 0.0, best)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{significant(count / size)} {unit}"
    return f"{count} B"


def _share(scores: Mapping[str, float], name: str) -> str:
    return f"{scores[name]:.3f}" if name in scores else _NONE


def _variant_table(report: Report, variants: Sequence[Variant], reference: bool) -> dict[str, object]:
    """Columns and rows of the main or the ablation table."""
    scores = score_names(report)
    exponents = {name: _exponent(variants, name) for name in ("latent_mse", "teacher_forced")}
    marks = best_marks(variants)
    several = len(bit_widths(variants)) > 1
    rows: list[dict[str, object]] = []
    if reference:
        shares = [_cell(_share(report.full_precision, n)) for n in scores]
        dash = _cell(_NONE)
        cells = [_cell("1.00"), dash, dash, dash, *shares, dash, dash]
        rows.append({"name": "Full precision", "cells": cells, "start": False})
    previous = None
    for i, v in enumerate(variants):
        cells = [_cell(f"{v.size_ratio:.2f}", _bytes(v.bytes))]
        cells.append(_measured(v.latent_mse, exponents["latent_mse"], (i, "latent_mse") in marks))
        mean, low, high = mean_interval(v.psnr)
        cells.append(_cell(f"{mean:.1f}", f"{low:.1f} to {high:.1f}", mean, (i, "psnr") in marks))
        cells.append(_measured(v.teacher_forced, exponents["teacher_forced"], (i, "teacher_forced") in marks))
        cells += [_cell(_share(v.scores, n), best=(i, n) in marks) for n in scores]
        cells += [_cell(f"{v.quantized} / {v.kept}"), _cell(f"{v.seconds:.1f}")]
        name = f"{v.method} {v.bits}" if several or reference else v.method
        rows.append({"name": name, "cells": cells, "start": v.bits != previous})
        previous = v.bits

    def unit(name: str) -> str:
        power = str(exponents[name]).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"in 10{power}" if exponents[name] else ""

    columns = [("size", "of bf16"), ("latent MSE", unit("latent_mse")), ("PSNR", "dB")]
    columns += [("teacher-forced", unit("teacher_forced"))]
    columns += [(n.replace("_", " "), "score") for n in scores]
    columns += [("linears", "quant. / kept"), ("made in", "s")]
    return {"columns": columns, "rows": rows}


def _running_rows(running: Sequence[Running]) -> list[list[str]]:
    """Cells of each model: milliseconds of a chunk, times as fast as the first, bytes of weights and cache."""
    return [
        [
            r.name,
            f"{1000 * r.seconds:.0f}",
            f"{running[0].seconds / r.seconds:.2f}",
            *map(_bytes, (r.weight_bytes, r.cache_bytes)),
        ]
        for r in running
    ]


def _comparisons(comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    return [
        {
            "bits": c.bits,
            "a": c.a,
            "b": c.b,
            "metric": metric_name(c.metric),
            "interval": interval_text(c),
            "outcome": outcome(c),
            "words": ablation_sentence(c),
        }
        for c in comparisons
    ]


def _layer_rows(layers: Sequence[LayerView]) -> list[dict[str, object]]:
    rows = []
    for layer in layers:
        outputs, inputs = layer.shape
        moved = f"{layer.raw_outliers} → {layer.outliers}" if layer.outliers else _NONE
        sqnr = _NONE if layer.output_sqnr is None else f"{layer.output_sqnr:.1f}"
        rows.append(
            {
                "layer": layer.layer,
                "quantized": layer.quantized,
                "cells": [
                    _cell(layer.bits if layer.quantized else _NONE),
                    _cell(f"{outputs} \N{MULTIPLICATION SIGN} {inputs}", sort=outputs * inputs),
                    _cell(moved, sort=layer.outliers),
                    _cell(sqnr, sort=-1e9 if layer.output_sqnr is None else layer.output_sqnr),
                ],
                "note": layer.kernel if layer.quantized else layer.reason,
            }
        )
    return rows


_BLOCK = re.compile(r"^(?P<stem>\D*)\.(?P<block>\d+)\.(?P<kind>.+)$")


def _outlier_panels(layers: Sequence[LayerView]) -> list[dict[str, Any]]:
    """Panels grouped by layer kind, a block in each column; layers outside blocks form the last group."""
    groups: dict[str, list[tuple[int, LayerView]]] = {}
    others: list[tuple[int, LayerView]] = []
    for layer in layers:
        if layer.norms is None or not len(layer.norms):
            continue
        found = _BLOCK.match(layer.layer)
        if found:
            groups.setdefault(found["kind"], []).append((int(found["block"]), layer))
        else:
            others.append((-1, layer))
    panels = []
    for kind, members in [*groups.items(), ("outside the blocks", others)]:
        if not members:
            continue
        tops = [float(np.max(v.norms)) / (v.median or 1.0) for _, v in members if v.norms is not None]
        top = 1.06 * max(1.3, *tops) if tops else 1.3
        views = [
            {
                "name": view.layer,
                "block": f"block {block}" if block >= 0 else view.layer,
                "svg": charts.outlier_curve(view, top),
                "outliers": view.outliers,
                "raw": view.raw_outliers,
                "inputs": view.shape[1],
                "median": significant(view.median),
                "threshold": significant(view.threshold),
            }
            for block, view in sorted(members, key=lambda m: m[0])
        ]
        panels.append({"kind": kind, "views": views})
    return panels


def flat_facts(settings: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as flat name and value pairs; nested mappings get dotted names."""
    rows: list[tuple[str, str]] = []
    for key, value in plain(settings).items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows += flat_facts(value, f"{prefix}{key}, ")
        elif isinstance(value, list):
            rows.append((name, ", ".join(map(str, value))))
        elif isinstance(value, float):
            rows.append((name, significant(value)))
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
            rows.append((name, f"{value:,}".replace(",", "\u202f")))
        else:
            rows.append((name, str(value)))
    return rows


def _responsive(draw: Any, rows: Sequence[object]) -> dict[str, object] | None:
    return {"wide": draw(rows, charts.WIDE), "narrow": draw(rows, charts.NARROW)} if rows else None


def _context(report: Report) -> dict[str, object]:
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    videos = len(report.variants[0].psnr) if report.variants else 0
    with_chunks = [v for v in report.variants if v.chunk_mse.size]
    clips = [_clip(c) for c in report.clips if c.frames]
    return {
        "report": report,
        "verdict": verdict(report),
        "headline": headline(report),
        "running": _running_rows(report.running),
        "written": written,
        "videos": videos,
        "settings": flat_facts(report.settings),
        "environment": flat_facts(report.environment),
        "seconds": flat_facts(report.seconds),
        "main": _variant_table(report, report.variants, reference=True),
        "ablation": _variant_table(report, report.ablation, reference=False),
        "ablation_bits": ", ".join(bit_widths(report.ablation)),
        "comparisons": _comparisons(report.comparisons),
        "ablation_comparisons": _comparisons(report.ablation_comparisons),
        "forest": _responsive(charts.forest, report.comparisons),
        "ablation_forest": _responsive(charts.forest, report.ablation_comparisons),
        "sensitivity": _responsive(charts.sensitivity, report.sensitivity),
        "chunk_errors": _responsive(charts.chunk_errors, with_chunks),
        "layers": _layer_rows(report.layers),
        "kept": sum(not layer.quantized for layer in report.layers),
        "panels": _outlier_panels(report.layers),
        "clips": clips,
        "player": {"clips": clips, "framesPerChunk": max(1, report.frames_per_chunk), "first": report.layers_of},
    }


def page_template(name: str) -> jinja2.Template:
    """A template of the pages; values are escaped, and unknown names are errors."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fxq.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_function"] = json.dumps
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template(name)


def render(report: Report) -> str:
    """The page as text."""
    return page_template("report.html.j2").render(_context(report))


def write_report(report: Report, path: str | os.PathLike[str]) -> pathlib.Path:
    """Write the page to ``path`` atomically: the file is the old one or the whole new one.

    Args:
        report: what was measured.
        path: the HTML file; folders above it are made.

    Returns:
        The path written.
    """
    out = pathlib.Path(path)
    text = render(report)
    with whole_file(out) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
    return out
