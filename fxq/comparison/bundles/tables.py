"""The results as one table, for a terminal, a page, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from fxq.comparison.bundles.contestant import FULL_PRECISION
from fxq.comparison.bundles.metrics import USUAL
from fxq.comparison.bundles.results import BundleResults, BundleRow
from fxq.report.tables import plain, significant

_NONE = "-"
_NOTABLE = 1e-3
"""Seconds: frames that only need to be clamped take less."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of every bundle: ``heading`` and ``unit`` in tables, how it is shown, and what full precision has."""

    heading: str
    unit: str
    text: Callable[[BundleRow], str]
    full: str = _NONE


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{significant(count / size)} {unit}"
    return f"{significant(count / 1e3)} kB"


def _db(value: float) -> str:
    return f"{value:.1f}"


def _worst(row: BundleRow) -> str:
    video, chunk = row.worst_place
    return f"{_db(row.worst)} (video {video}, chunk {chunk})"


def _ends(row: BundleRow) -> str:
    by_chunk = row.free.mean(0)
    return f"{_db(by_chunk[0])} → {_db(by_chunk[-1])}"


def _metric(name: str) -> Callable[[BundleRow], str]:
    return lambda row: significant(row.metrics[name], 4)


def columns(results: BundleResults) -> list[Column]:
    """The columns, those of metrics that were given among them."""
    full, seconds = results.full, results.full.per_chunk
    found = [
        Column(heading="size", unit="of bf16", text=lambda row: f"{row.size_ratio:.3f}", full="1"),
        Column(heading="forced PSNR", unit="median chunk, dB", text=lambda row: _db(row.median)),
        Column(heading="forced PSNR", unit="worst chunk, dB", text=_worst),
        Column(heading="free PSNR", unit="mean, dB", text=lambda row: _db(float(row.free.mean()))),
        Column(heading="free PSNR", unit="first → last chunk, dB", text=_ends),
        Column(heading="SSIM", unit="free", text=lambda row: f"{row.ssim.mean():.4f}"),
        Column(
            heading="time",
            unit="s a chunk",
            text=lambda row: significant(row.cost.per_chunk),
            full=significant(seconds),
        ),
        Column(
            heading="speed", unit="of full precision", text=lambda row: f"{seconds / row.cost.per_chunk:.2f}", full="1"
        ),
        Column(heading="memory", unit="peak", text=lambda row: _bytes(row.cost.peak), full=_bytes(full.peak)),
    ]
    for name, value in results.full_metrics.items():
        found.append(Column(heading=name, unit="", text=_metric(name), full=significant(value, 4)))
    return found


def sentences(results: BundleResults) -> dict[str, str]:
    """Of each bundle what people ask first, in words."""
    found = {}
    for row in results.rows:
        video, chunk = row.worst_place
        found[row.name] = (
            f"made from full precision's history, the median chunk has {_db(row.median)} dB and the worst "
            f"{_db(row.worst)} dB (video {video}, chunk {chunk}); its own videos have {_db(float(row.free.mean()))} dB."
        )
    return found


def lacking(results: BundleResults) -> str:
    """Which usual metrics were not measured, and how they would be; "" when none is lacking."""
    given = [name.lower() for name in results.full_metrics]
    absent = [name for name in USUAL if not any(name.lower() in word for word in given)]
    if not absent:
        return ""
    listed = " and ".join((", ".join(absent[:-1]), absent[-1])) if len(absent) > 1 else absent[0]
    return (
        f"Not measured: {listed}. Networks with weights of their own judge these, and fxq ships none; --metric "
        "NAME=package.module:function adds one of yours."
    )


def about(results: BundleResults) -> str:
    """What the columns mean, in one paragraph."""
    of = (
        "decoded frames, in -1..1"
        if results.space == "pixels"
        else ("latents between the extremes of full precision's, as no decoder was given")
    )
    seconds = results.decoding or 0.0
    decoding = f", which takes {significant(seconds)} s a chunk more" if seconds >= _NOTABLE else ""
    return (
        f"PSNR and SSIM are of {of}. Forced: each chunk is made from full precision's chunks before it and the same "
        "noise, so that errors do not add up; the worst is of all chunks of all videos. Free: the bundle's own videos. "
        f"Time: median over chunks, denoising and context calls, without decoding{decoding}. Memory: "
        f"{results.memory}. All have the same prompts and noise."
    )


def terminal_table(results: BundleResults) -> Table:
    """A table for the terminal."""
    table = Table(
        title=escape(results.title), box=box.SIMPLE_HEAD, title_justify="left", header_style="bold", padding=0
    )
    table.add_column("", no_wrap=True)
    table.add_column("bits", no_wrap=True)
    shown = columns(results)
    for column in shown:
        table.add_column(escape(f"{column.heading}\n{column.unit}"), justify="right")
    table.add_row(FULL_PRECISION, "", *(column.full for column in shown))
    for row in results.rows:
        table.add_row(escape(row.name), row.bits, *(escape(column.text(row)) for column in shown))
    return table


def markdown_table(results: BundleResults) -> str:
    """The table to paste, without a heading."""
    shown = columns(results)
    lines = [
        _line(["", "bits", *(f"{column.heading} {column.unit}".strip() for column in shown)]),
        "| --- | --- |" + " ---: |" * len(shown),
        _line([FULL_PRECISION, "", *(column.full for column in shown)]),
    ]
    lines += [_line([row.name, row.bits, *(column.text(row) for column in shown)]) for row in results.rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def to_markdown(results: BundleResults) -> str:
    """The table with what it means, prompts, the command that makes it again, and where."""
    machine = ", ".join(f"{name} {value}" for name, value in results.environment.items())
    lines = [f"# {_escaped(results.title)}", "", markdown_table(results), "", about(results)]
    if absent := lacking(results):
        lines += ["", absent]
    lines += ["", *(f"{i + 1}. {_escaped(prompt)}" for i, prompt in enumerate(results.prompts))]
    lines += ["", f"`{results.command}`", "", f"{results.date}; {machine}.", ""]
    return "\n".join(lines)


def chunks_to_csv(results: BundleResults) -> str:
    """One line a chunk of a video of a bundle, and of full precision: PSNR in dB, seconds."""
    text = io.StringIO()
    names = ("version", "video", "chunk", "forced_psnr", "free_psnr", "seconds")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for version, row in ((FULL_PRECISION, None), *((row.name, row) for row in results.rows)):
        seconds = results.full.seconds if row is None else row.cost.seconds
        for video, chunk in np.ndindex(seconds.shape):
            errors = ("", "") if row is None else (row.forced[video, chunk], row.free[video, chunk])
            writer.writerow((version, video + 1, chunk + 1, *errors, seconds[video, chunk]))
    return text.getvalue()


def to_json(results: BundleResults) -> dict[str, object]:
    """Everything in types that ``json.dumps`` takes; numbers that are not finite are null."""
    rows = []
    for row in results.rows:
        video, chunk = row.worst_place
        rows.append(
            {
                "name": row.name,
                "bits": row.bits,
                "size_ratio": row.size_ratio,
                "forced_psnr_median": row.median,
                "forced_psnr_worst": row.worst,
                "worst_video": video,
                "worst_chunk": chunk,
                "free_psnr": float(row.free.mean()),
                "ssim": float(row.ssim.mean()),
                "seconds_per_chunk": row.cost.per_chunk,
                "peak_bytes": row.cost.peak,
                "metrics": dict(row.metrics),
                "by_chunk": {"forced_psnr": row.forced, "free_psnr": row.free, "seconds": row.cost.seconds},
            }
        )
    names = ("title", "command", "date", "environment", "settings", "space", "memory", "prompts", "clips", "decoding")
    shared = {name: getattr(results, name) for name in names}
    full = {
        "seconds_per_chunk": results.full.per_chunk,
        "peak_bytes": results.full.peak,
        "metrics": dict(results.full_metrics),
        "seconds": results.full.seconds,
    }
    encoded: dict[str, object] = plain(shared | {"not_measured": lacking(results), "full": full, "rows": rows})
    return encoded
