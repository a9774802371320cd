"""The results as one table: its columns, and their forms for a terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from fxq.comparison.results import ERRORS, Results, Row
from fxq.report.tables import mean_interval, plain, significant
from fxq.report.verdict import bit_widths, comparison_sentence, interval_text, metric_name

_NONE = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One number of every row.

    ``key`` in files, ``heading`` and ``unit`` in tables, where ``text`` writes ``value``, NaN as a dash; ``better`` is
    the direction of good values, empty where there is none; ``full``: the value of full precision.
    """

    key: str
    heading: str
    value: Callable[[Row], float]
    text: Callable[[float], str]
    unit: str = ""
    better: str = ""
    full: float = math.nan

    def cell(self, value: float) -> str:
        """A value as tables show it."""
        return _NONE if math.isnan(value) else self.text(value)


def _decimals(count: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{count}f}"


def _error(key: str, heading: str, unit: str, value: Callable[[Row], float]) -> Column:
    return Column(key=key, heading=heading, unit=unit, value=value, text=significant, better="lower")


def _similarity(
    key: str,
    heading: str,
    unit: str,
    value: Callable[[Row], float],
    text: Callable[[float], str],
    full: float = math.nan,
) -> Column:
    return Column(key=key, heading=heading, unit=unit, value=value, text=text, better="higher", full=full)


def columns(results: Results) -> list[Column]:
    """The columns of a table, object scores among them where they were measured."""
    three = _decimals(3)
    found = [
        Column(key="size_ratio", heading="size", unit="of bf16", value=lambda r: r.variant.whole_ratio, text=three),
        _error("teacher_forced", "forced error", "mean", lambda r: float(r.variant.teacher_forced.mean())),
        _error(
            "teacher_forced_median_chunk", "forced error", "median chunk", lambda r: float(np.median(r.forced_by_chunk))
        ),
        _error("teacher_forced_worst_chunk", "forced error", "worst chunk", lambda r: max(r.forced_by_chunk)),
        _error("latent_mse", "latent MSE", "mean", lambda r: float(r.variant.latent_mse.mean())),
        _similarity("psnr", "PSNR", "dB", lambda r: float(r.variant.psnr.mean()), _decimals(1)),
        _similarity("ssim", "SSIM", "", lambda r: float(r.variant.ssim.mean()), _decimals(4)),
    ]
    for name, share in results.full_precision.items():
        found.append(_similarity(name, name.replace("_", " "), "score", _score(name), three, share))
    found.append(Column(key="seconds", heading="time", unit="s", value=lambda r: r.seconds.total, text=_decimals(1)))
    return found


def _score(name: str) -> Callable[[Row], float]:
    return lambda row: row.variant.scores[name]


def best(results: Results, column: Column) -> set[int]:
    """Rows with the best value of a column at their width, as the table shows it; none where all show the same."""
    marked: set[int] = set()
    if not column.better:
        return marked
    values = [column.value(row) for row in results.rows]
    for bits in bit_widths(results.variants):
        rows = [i for i, row in enumerate(results.rows) if row.variant.bits == bits and not math.isnan(values[i])]
        shown = {column.cell(values[i]) for i in rows}
        if len(shown) > 1:
            top = (min if column.better == "lower" else max)(values[i] for i in rows)
            marked |= {i for i in rows if column.cell(values[i]) == column.cell(top)}
    return marked


def ratio_cell(row: Row, metric: str, base: str) -> str:
    """The paired ratio of an error to the base's, with its interval; 1 for the base itself."""
    if row.variant.method == base:
        return "1"
    return interval_text(row.paired[metric]) if metric in row.paired else _NONE


def headings(results: Results) -> list[tuple[str, str]]:
    """Heading and unit of every column behind the row's name, the two paired ratios last."""
    last = [(f"{heading} / base", "95 %") for heading in ("forced error", "latent MSE")]
    return [(column.heading, column.unit) for column in columns(results)] + last


def cells(results: Results, row: Row) -> list[str]:
    """What every column shows of a row, the two paired ratios last."""
    return [column.cell(column.value(row)) for column in columns(results)] + [
        ratio_cell(row, metric, results.base) for metric in ERRORS
    ]


def full_precision_cells(results: Results) -> list[str]:
    """What every column shows of full precision: its object scores."""
    return ["1", *(column.cell(column.full) for column in columns(results)[1:]), _NONE, _NONE]


def terminal_table(results: Results) -> Table:
    """A table for the terminal, the best of each width bold; what does not fit is in the files."""
    title = escape(f"{results.title}; base: {results.base}")
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", header_style="bold", padding=0)
    names = [("method", ""), ("bits", ""), *headings(results)]
    left_out = next((i for i, (heading, _) in enumerate(names) if heading == "exact steps"), len(names))
    for i, (heading, unit) in enumerate(names):
        if i != left_out:
            justify: Literal["left", "right"] = "left" if i < 2 else "right"
            table.add_column(escape(f"{heading}\n{unit}"), justify=justify, no_wrap=i < 2 or i > len(names) - 3)

    def add(texts: Sequence[str], end_section: bool) -> None:
        table.add_row(*(text for i, text in enumerate(texts) if i != left_out), end_section=end_section)

    if results.full_precision:
        add(["full precision", "", *full_precision_cells(results)], True)
    marks = [best(results, column) for column in columns(results)]
    for i, row in enumerate(results.rows):
        shown = [escape(text) for text in cells(results, row)]
        for j, marked in enumerate(marks):
            shown[j] = f"[bold]{shown[j]}[/bold]" if i in marked else shown[j]
        ends = i + 1 < len(results.rows) and results.rows[i + 1].variant.bits != row.variant.bits
        add([escape(row.variant.method), row.variant.bits, *shown], ends)
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
        for part in ("ratio", "low", "high"):
            numbers[f"{metric}_{part}_to_base"] = math.nan if paired is None else getattr(paired, part)
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
    names = ["method", "bits", *(f"{heading} {unit}".strip() for heading, unit in headings(results))]
    lines += ["", f"Ratios are to {_markdown(results.base)}. Forced error is the teacher-forced one.", ""]
    lines += [*_markdown_row(names), "| --- | --- |" + " ---: |" * (len(names) - 2)]
    if results.full_precision:
        lines += _markdown_row(["full precision", "", *full_precision_cells(results)])
    for row in results.rows:
        lines += _markdown_row([row.variant.method, row.variant.bits, *cells(results, row)])
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
