"""The results as one table: its columns, and their forms for a terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from fxq.comparison.results import ERRORS, Results, Row
from fxq.report.tables import mean_interval, plain, significant
from fxq.report.verdict import bit_widths, comparison_sentence, metric_name, ratio_text

_NONE = "-"


def _nothing(row: Row) -> str:
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One number of every row.

    ``key`` in files, ``heading`` and ``unit`` in tables, where ``text`` writes ``value``, NaN as a dash, and ``below``
    says more, in one line with it where ``inline``; ``better`` is the direction of good values, empty where there is
    none; ``full``: the value of full precision.
    """

    key: str
    heading: str
    value: Callable[[Row], float]
    text: Callable[[float], str]
    unit: str = ""
    below: Callable[[Row], str] = _nothing
    inline: bool = False
    better: str = ""
    full: float = math.nan

    def shown(self, value: float) -> str:
        """A value as tables show it."""
        return _NONE if math.isnan(value) else self.text(value)

    def cell(self, row: Row) -> str:
        """What a table of one line a row shows."""
        below = self.below(row) if self.inline else ""
        return self.shown(self.value(row)) + (f" ({below})" if below else "")


def _decimals(count: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{count}f}"


def _mean(metric: str) -> Callable[[Row], float]:
    return lambda row: float(getattr(row.variant, metric).mean())


def _interval(metric: str) -> Callable[[Row], str]:
    return lambda row: " to ".join(map(significant, mean_interval(getattr(row.variant, metric))[1:]))


def _score(name: str) -> Callable[[Row], float]:
    return lambda row: row.variant.scores[name]


def _ratio(metric: str, heading: str) -> Column:
    """The paired ratio of an error to the base's."""

    def interval(row: Row) -> str:
        found = row.paired.get(metric)
        # The base against itself: 1 and nothing to say.
        return (
            "" if found is None or found.low == found.high else f"{ratio_text(found.low)} to {ratio_text(found.high)}"
        )

    return Column(
        key=f"{metric}_to_base",
        heading=heading,
        unit="/ base",
        value=lambda row: row.paired[metric].ratio if metric in row.paired else math.nan,
        text=ratio_text,
        below=interval,
        inline=True,
    )


def columns(results: Results) -> list[Column]:
    """The columns of a table, object scores among them where they were measured."""
    forced, free = ERRORS
    error = functools.partial(Column, text=significant, better="lower")
    alike = functools.partial(Column, better="higher")
    found = [
        Column(
            key="size_ratio", heading="size", unit="of bf16", value=lambda r: r.variant.whole_ratio, text=_decimals(3)
        ),
        error(key=forced, heading="forced error", unit="mean", value=_mean(forced), below=_interval(forced)),
        _ratio(forced, "forced error"),
        error(
            key=f"{forced}_median_chunk",
            heading="forced error",
            unit="median chunk",
            value=lambda r: float(np.median(r.forced_by_chunk)),
        ),
        error(
            key=f"{forced}_worst_chunk",
            heading="forced error",
            unit="worst chunk",
            value=lambda r: max(r.forced_by_chunk),
            below=lambda r: f"chunk {r.worst_chunk}",
        ),
        error(key=free, heading="latent MSE", unit="mean", value=_mean(free), below=_interval(free)),
        _ratio(free, "latent MSE"),
        alike(key="psnr", heading="PSNR", unit="dB", value=_mean("psnr"), text=_decimals(1), below=_interval("psnr")),
        alike(key="ssim", heading="SSIM", value=_mean("ssim"), text=_decimals(4), below=_interval("ssim")),
    ]
    for name, share in results.full_precision.items():
        heading, value = name.replace("_", " "), _score(name)
        found.append(alike(key=name, heading=heading, unit="score", value=value, text=_decimals(3), full=share))
    seconds = Column(key="seconds", heading="time", unit="s", value=lambda r: r.seconds.total, text=_decimals(1))
    return [*found, seconds]


def best(results: Results, column: Column) -> set[int]:
    """Rows with the best value of a column at their width, as the table shows it; none where all show the same."""
    marked: set[int] = set()
    if not column.better:
        return marked
    values = [column.value(row) for row in results.rows]
    for bits in bit_widths(results.variants):
        rows = [i for i, row in enumerate(results.rows) if row.variant.bits == bits and not math.isnan(values[i])]
        if len({column.shown(values[i]) for i in rows}) > 1:
            top = (min if column.better == "lower" else max)(values[i] for i in rows)
            marked |= {i for i in rows if column.shown(values[i]) == column.shown(top)}
    return marked


def full_precision_cells(columns: Sequence[Column]) -> list[str]:
    """What columns show of full precision: its object scores."""
    return ["1" if column.key == "size_ratio" else column.shown(column.full) for column in columns]


def short_columns(results: Results) -> list[Column]:
    """The columns that fit a terminal or a page; the files have all."""
    return [column for column in columns(results) if column.key != "exact_steps"]


def terminal_table(results: Results) -> Table:
    """A table for the terminal, the best of each width bold."""
    title = escape(f"{results.title}; base: {results.base}")
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", header_style="bold", padding=0)
    table.add_column("method", no_wrap=True)
    table.add_column("bits", no_wrap=True)
    shown = short_columns(results)
    for column in shown:
        table.add_column(escape(f"{column.heading}\n{column.unit}"), justify="right")
    if results.full_precision:
        table.add_row("full precision", "", *full_precision_cells(shown), end_section=True)
    marks = [best(results, column) for column in shown]
    for i, row in enumerate(results.rows):
        cells = [escape(column.cell(row)) for column in shown]
        cells = [f"[bold]{cell}[/bold]" if i in mark else cell for cell, mark in zip(cells, marks, strict=True)]
        ends = i + 1 < len(results.rows) and results.rows[i + 1].variant.bits != row.variant.bits
        table.add_row(escape(row.variant.method), row.variant.bits, *cells, end_section=ends)
    return table


def reliability_rows(results: Results) -> list[list[str]]:
    """Metric, CV, BOA, DS and the variation between seeds, as tables show them."""
    rows = []
    for found in results.reliability:
        numbers = (found.cv, found.boa, found.ds, found.between_seeds)
        rows.append([metric_name(found.metric), *(_NONE if math.isnan(x) else f"{x:.3f}" for x in numbers)])
    return rows


RELIABILITY = ("metric", "CV", "BOA", "DS", "CV between seeds")


def reliability_table(results: Results) -> Table:
    """How far each metric ranks the rows, for the terminal."""
    table = Table(title="metric reliability", box=box.SIMPLE_HEAD, title_justify="left", header_style="bold")
    for i, name in enumerate(RELIABILITY):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in reliability_rows(results):
        table.add_row(*row)
    return table


def sentences(results: Results) -> dict[str, str]:
    """By width: the row with the least error of each kind among those that are not the base, against the base."""
    found = {}
    for bits in bit_widths(results.variants):
        rows = [r for r in results.rows if r.variant.bits == bits and r.variant.method != results.base and r.paired]
        if rows:
            least = [min((r.paired[metric] for r in rows), key=lambda c: c.ratio) for metric in ERRORS]
            found[bits] = " ".join(comparison_sentence(c) for c in least)
    return found


def record(results: Results, row: Row) -> dict[str, object]:
    """A row as numbers by name: means, intervals, ratios to the base with theirs, sizes and seconds."""
    v = row.variant
    numbers: dict[str, object] = {"method": v.method, "bits": v.bits, "base": results.base, "videos": len(v.psnr)}
    for column in columns(results):
        numbers[column.key] = column.value(row)
        if column.key in (*ERRORS, "psnr", "ssim"):
            _, numbers[f"{column.key}_low"], numbers[f"{column.key}_high"] = mean_interval(getattr(v, column.key))
    for metric in ERRORS:
        paired = row.paired.get(metric)
        for part in ("low", "high"):
            numbers[f"{metric}_to_base_{part}"] = math.nan if paired is None else getattr(paired, part)
    numbers |= {"worst_chunk": row.worst_chunk, "bytes": v.bytes, "kept_bytes": v.kept_bytes}
    numbers |= {"linears_quantized": v.quantized, "linears_kept": v.kept}
    return numbers | {f"seconds_{f.name}": getattr(row.seconds, f.name) for f in dataclasses.fields(row.seconds)}


def to_csv(results: Results) -> str:
    """One line a row, :func:`record`; numbers as Python writes them, empty where there is none."""
    return _csv([record(results, row) for row in results.rows])


def chunks_to_csv(results: Results) -> str:
    """One line a chunk of a row: both errors, means over videos."""
    lines: list[dict[str, object]] = []
    for row in results.rows:
        for i, (forced, free) in enumerate(zip(row.forced_by_chunk, row.variant.chunk_mse.mean(0), strict=True)):
            named = {"method": row.variant.method, "bits": row.variant.bits, "chunk": i + 1}
            lines.append(named | {"teacher_forced": forced, "latent_mse": float(free)})
    return _csv(lines)


def _csv(lines: Sequence[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: "" if plain(v) is None else v for k, v in line.items()} for line in lines])
    return text.getvalue()


def to_json(results: Results) -> dict[str, object]:
    """Everything in types that ``json.dumps`` takes: rows as :func:`record` with errors by video, chunk and seed."""
    rows = []
    for row in results.rows:
        v = row.variant
        by_video = {name: getattr(v, name) for name in (*ERRORS, "psnr", "ssim")}
        by_chunk = {"teacher_forced": row.forced_by_chunk, "latent_mse": v.chunk_mse.mean(0)}
        rows.append(record(results, row) | {"by_chunk": by_chunk, "by_seed": row.seeds, "by_video": by_video})
    shared = {f.name: getattr(results, f.name) for f in dataclasses.fields(results)}
    reliability = [dataclasses.asdict(found) | {"ds": found.ds} for found in results.reliability]
    encoded: dict[str, object] = plain(shared | {"rows": rows, "reliability": reliability})
    return encoded


def to_markdown(results: Results, pictures: Sequence[str] = ()) -> str:
    """The tables, the command that makes them again, and where; with links to ``pictures``."""
    lines = [f"# {_markdown(results.title)}", ""]
    lines += [f"* **{bits}**: {_markdown(text)}" for bits, text in sentences(results).items()]
    shown = columns(results)
    names = ["method", "bits", *(f"{column.heading} {column.unit}".strip() for column in shown)]
    lines += ["", f"Ratios are to {_markdown(results.base)}. Forced error is the teacher-forced one.", ""]
    lines += [*_markdown_row(names), "| --- | --- |" + " ---: |" * (len(names) - 2)]
    if results.full_precision:
        lines += _markdown_row(["full precision", "", *full_precision_cells(shown)])
    for row in results.rows:
        lines += _markdown_row([row.variant.method, row.variant.bits, *(column.cell(row) for column in shown)])
    lines += ["", "Metric reliability:", "", *_markdown_row(RELIABILITY), "| --- | ---: | ---: | ---: | ---: |"]
    for found in reliability_rows(results):
        lines += _markdown_row(found)
    lines += ["", *(f"![{name}]({name})" for name in pictures)]
    machine = ", ".join(f"{name} {value}" for name, value in results.environment.items())
    lines += ["", f"`{results.command}`", "", f"{results.date}; {machine}.", ""]
    return "\n".join(lines)


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _markdown_row(texts: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(_markdown(text) for text in texts) + " |"]
