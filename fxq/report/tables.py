"""A report as terminal tables and as JSON."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table

from fxq.metrics.latents import bootstrap
from fxq.report.data import PUBLISHED_SENSITIVITY, Comparison, Report, Variant
from fxq.report.verdict import ablation_sentence, bit_widths, interval_text, metric_name, outcome, verdict

LOWER_IS_BETTER = {"latent_mse": True, "psnr": False, "teacher_forced": True}
"""The per-video measures of a variant that tables show, and their direction."""


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean over videos with its 95 % bootstrap bounds; NaN for no videos, no bounds for infinite values."""
    if not len(values):
        return (math.nan,) * 3
    if not np.isfinite(values).all():
        return float(values.mean()), math.nan, math.nan
    low, high = bootstrap(values)
    return float(values.mean()), float(low), float(high)


def score_names(report: Report) -> list[str]:
    """Names of all scores, full precision's first."""
    return list(dict.fromkeys([*report.full_precision, *(n for v in report.variants for n in v.scores)]))


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent between 1e-4 and 1e6."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def best_marks(variants: Sequence[Variant]) -> set[tuple[int, str]]:
    """(index, column) of the best mean at each bit width with more than one variant; equal values are not marked."""
    marks: set[tuple[int, str]] = set()
    index = {id(v): i for i, v in enumerate(variants)}
    for group in bit_widths(variants).values():
        columns = {name: [float(getattr(v, name).mean()) for v in group] for name in LOWER_IS_BETTER}
        for name in group[0].scores:
            columns[name] = [v.scores.get(name, math.nan) for v in group]
        for name, values in columns.items():
            signed = values if LOWER_IS_BETTER.get(name, False) else [-value for value in values]
            if len(group) > 1 and signed.count(min(signed)) == 1:
                marks.add((index[id(group[signed.index(min(signed))])], name))
    return marks


def _table(report: Report, variants: Sequence[Variant], title: str, reference: bool) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left", header_style="bold", padding=0)
    table.add_column("model", overflow="fold")
    scores = score_names(report)
    for name in ("size", "latent\nMSE", "PSNR\ndB", "forced\nerror", *(n.replace("_", "\n") for n in scores)):
        table.add_column(escape(name), justify="right", no_wrap=True)
    table.add_column("made\nin s", justify="right", no_wrap=True)
    if reference:
        shares = (f"{report.full_precision[n]:.3f}" if n in report.full_precision else "-" for n in scores)
        table.add_row("Full precision", "1.00x", "-", "-", "-", *shares, "-", end_section=True)
    marks = best_marks(variants)

    def cell(i: int, name: str, text: str) -> str:
        return f"[bold]{text}[/bold]" if (i, name) in marks else text

    for i, v in enumerate(variants):
        shares = (cell(i, n, f"{v.scores[n]:.3f}") if n in v.scores else "-" for n in scores)
        table.add_row(
            escape(f"{v.method} {v.bits}"),
            f"{v.size_ratio:.2f}x",
            cell(i, "latent_mse", f"{v.latent_mse.mean():.2e}"),
            cell(i, "psnr", f"{v.psnr.mean():.1f}"),
            cell(i, "teacher_forced", f"{v.teacher_forced.mean():.2e}"),
            *shares,
            f"{v.seconds:.1f}",
            end_section=i + 1 < len(variants) and variants[i + 1].bits != v.bits,
        )
    return table


def main_table(report: Report) -> Table:
    """Full precision, then every variant; the better mean at each bit width is bold. 80 columns hold every number."""
    videos = len(report.variants[0].psnr) if report.variants else 0
    return _table(report, report.variants, f"{report.title}: {videos} videos", reference=True)


def ablation_table(report: Report) -> Table:
    """What each part adds."""
    bits = ", ".join(bit_widths(report.ablation))
    return _table(report, report.ablation, f"Ablation {bits}".rstrip(), reference=False)


def _line(comparison: Comparison, words: str) -> str:
    c = comparison
    return f"{c.bits} {metric_name(c.metric)}: {c.a} / {c.b} = {interval_text(c)}, {c.videos} videos: {words}"


def comparison_lines(report: Report) -> list[str]:
    """Every paired comparison, then those of the ablation, one line of plain text each."""
    words = {"lower": "lower", "higher": "higher", "unresolved": "not resolved, the interval contains 1"}
    lines = [_line(c, words[outcome(c)]) for c in report.comparisons]
    return lines + [_line(c, ablation_sentence(c)) for c in report.ablation_comparisons]


def plain(value: object) -> Any:
    """``value`` in types that JSON has; numbers that are not finite become None, unknown objects their text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, pathlib.PurePath) else repr(value)


def _variant_json(variant: Variant) -> dict[str, object]:
    result: dict[str, object] = plain(variant)
    for name in LOWER_IS_BETTER:
        mean, low, high = mean_interval(getattr(variant, name))
        result[f"{name}_mean"] = plain(mean)
        result[f"{name}_interval95"] = plain([low, high])
    result["chunk_mse_mean"] = plain(variant.chunk_mse.mean(0))
    return result


def report_to_json(report: Report) -> dict[str, object]:
    """The report without channel norms and frames, in types that ``json.dumps`` takes."""
    result = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    result["variants"] = [_variant_json(v) for v in report.variants]
    result["ablation"] = [_variant_json(v) for v in report.ablation]
    result["layers"] = [
        {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.name != "norms"}
        for layer in report.layers
    ]
    result["clips"] = [{"prompt": clip.prompt, "chunk_mse": clip.chunk_mse} for clip in report.clips]
    result["comparisons"] = [plain(c) | {"outcome": outcome(c)} for c in report.comparisons]
    result["ablation_comparisons"] = [plain(c) | {"outcome": outcome(c)} for c in report.ablation_comparisons]
    result["published_sensitivity"] = PUBLISHED_SENSITIVITY
    result["verdict"] = verdict(report).sentences
    encoded: dict[str, object] = plain(result)
    return encoded
