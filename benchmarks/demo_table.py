"""The demo's two tables of the README, from its report.

python -m benchmarks.demo_table out/demo/report.json
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

COLUMNS = ("", "size of bf16", "latent MSE", "PSNR dB", "teacher-forced error", "shape", "colour", "motion")
RATIOS = ("| | teacher-forced error | latent MSE of the free rollout |", "| --- | --- | --- |")


def _error(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-3 else f"{value:.2e}"


def variants_table(report: Mapping[str, Any]) -> str:
    """One row for each variant, full precision first."""
    lines = [f"|{' | '.join(COLUMNS)} | linears quantized / kept |", "| --- " * 9 + "|"]
    scores = report["full_precision"]
    shown = " | ".join(f"{scores[name]:.2f}" for name in ("shape", "colour", "motion"))
    lines.append(f"| full precision | 1 | - | - | - | {shown} | - |")
    for row in report["variants"]:
        scores = " | ".join(f"{row['scores'][name]:.2f}" for name in ("shape", "colour", "motion"))
        errors = f"{_error(row['latent_mse_mean'])} | {row['psnr_mean']:.1f} | {_error(row['teacher_forced_mean'])}"
        counts = f"{row['quantized']} / {row['kept']}"
        lines.append(f"| {row['method']} {row['bits']} | {row['size_ratio']:.3f} | {errors} | {scores} | {counts} |")
    return "\n".join(lines)


def ratios_table(report: Mapping[str, Any]) -> str:
    """Q-ARVD over MinMax for each bit width, with the intervals."""
    found = {(row["bits"], row["metric"]): row for row in report["comparisons"]}
    lines = list(RATIOS)
    for bits in dict.fromkeys(bits for bits, _ in found):
        cells = [found[bits, metric] for metric in ("teacher_forced", "latent_mse")]
        shown = " | ".join(f"{c['ratio']:.2f} ({c['low']:.2f} to {c['high']:.2f})" for c in cells)
        lines.append(f"| {bits} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    content = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(variants_table(content), ratios_table(content), sep="\n\n")
