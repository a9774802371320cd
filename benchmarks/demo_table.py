"""The demo's tables of README.md and docs/results.md, from its report.

python -m benchmarks.demo_table benchmarks/results/demo.json            # prints them
python -m benchmarks.demo_table benchmarks/results/demo.json --write    # writes them into the two pages
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
SCORES = ("shape", "colour", "motion")
COLUMNS = ("", "size of bf16", "latent MSE", "PSNR dB", "teacher-forced error", *SCORES, "linears quantized / kept")
SHORT_COLUMNS = ("", "size of bf16", "PSNR dB", *SCORES)
RATIO_COLUMNS = ("", "teacher-forced error", "latent MSE of the free rollout")


def _error(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-3 else f"{value:.2e}"


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    head = f"|{' | '.join(columns)} |"
    return "\n".join([head, "| --- " * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def _scores(scores: Mapping[str, float]) -> list[str]:
    return [f"{scores[name]:.2f}" for name in SCORES]


def variants_table(report: Mapping[str, Any]) -> str:
    """One row for each variant, full precision first."""
    rows = [["full precision", "1", "-", "-", "-", *_scores(report["full_precision"]), "-"]]
    for row in report["variants"]:
        errors = [_error(row["latent_mse_mean"]), f"{row['psnr_mean']:.1f}", _error(row["teacher_forced_mean"])]
        counts = f"{row['quantized']} / {row['kept']}"
        name = f"{row['method']} {row['bits']}"
        rows.append([name, f"{row['size_ratio']:.3f}", *errors, *_scores(row["scores"]), counts])
    return _table(COLUMNS, rows)


def short_table(report: Mapping[str, Any]) -> str:
    """The same rows with what needs no explanation: size, PSNR and scores."""
    rows = [["full precision", "1", "-", *_scores(report["full_precision"])]]
    for row in report["variants"]:
        name, size = f"{row['method']} {row['bits']}", f"{row['size_ratio']:.3f}"
        rows.append([name, size, f"{row['psnr_mean']:.1f}", *_scores(row["scores"])])
    return _table(SHORT_COLUMNS, rows)


def ratios_table(report: Mapping[str, Any]) -> str:
    """Every pair of methods for each bit width, with the intervals."""
    found = {(row["bits"], row["a"], row["b"], row["metric"]): row for row in report["comparisons"]}
    rows = []
    for bits, a, b in dict.fromkeys(key[:3] for key in found):
        cells = [found[bits, a, b, metric] for metric in ("teacher_forced", "latent_mse")]
        rows.append([f"{a} / {b} {bits}", *(f"{c['ratio']:.2f} ({c['low']:.2f} to {c['high']:.2f})" for c in cells)])
    return _table(RATIO_COLUMNS, rows)


TABLES = {
    "README.md": {"demo": short_table},
    "docs/results.md": {"demo": variants_table, "ratios": ratios_table},
}
"""By page, and by the marks ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` around it, the function of each table."""


def filled(page: str, text: str, report: Mapping[str, Any]) -> str:
    """The page's text with its tables made of the report.

    Raises:
        ValueError: when the text lacks the marks of a table.
    """
    for name, table in TABLES[page].items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} has no {begin.strip()} ... {end}")
        text = pattern.sub(lambda found, table=table: f"{found[1]}{table(report)}\n{found[2]}", text)
    return text


def main(arguments: list[str]) -> None:
    """Print the tables, or write them into the pages."""
    report = json.loads(pathlib.Path(arguments[0]).read_text(encoding="utf-8"))
    if "--write" not in arguments:
        print(variants_table(report), ratios_table(report), sep="\n\n")
        return
    for page in TABLES:
        path = ROOT / page
        path.write_text(filled(page, path.read_text(encoding="utf-8"), report), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
