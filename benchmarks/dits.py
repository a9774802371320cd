"""Every transformer of diffusers in tiny, quantized at W8A8: the tables of docs/dits.md.

python -m benchmarks.dits --json benchmarks/results/dits.json --docs docs/dits.md
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import time
from typing import Any

import diffusers
import torch

import fxq
from fxq import kernels
from fxq.capture.trace import TraceError
from fxq.core.graph import linear_sites
from fxq.environment import environment
from fxq.metrics.outputs import output_sqnr
from fxq.passes.methods.ranges import MinMax
from fxq.presets import wan_recipe
from tests.diffusers.cases import Case, linears
from tests.diffusers.configs import CASES

RECIPE = wan_recipe("w8a8", fxq.Scheme(), (MinMax(),), weighting="uniform")
MARK = "<!-- written by python -m benchmarks.dits -->"


def measure(case: Case) -> dict[str, Any]:
    """Counts and output SQNR of one case, or why it was refused."""
    model, start = case.build(), time.perf_counter()
    row: dict[str, Any] = {"case": case.name, "linears": len({id(m) for m in linears(model).values()})}
    try:
        quantized = fxq.quantize(model, [case.batch(1), case.batch(2)], RECIPE, progress=False)
    except TraceError as error:
        return row | {"refused": str(error), "why": case.why, "seconds": round(time.perf_counter() - start, 1)}
    summary = fxq.summary(quantized)
    products = quantized.graph.find_nodes(op="call_function", target=kernels.dual_scale_linear.definition)
    return row | {
        "calls": len(products) + len(list(linear_sites(quantized))),
        "quantized": len(summary.quantized),
        "kept": dict(collections.Counter(entry.reason for entry in summary.kept if entry not in summary.others)),
        "sqnr": round(output_sqnr(model, quantized, [case.batch(9)]), 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the cases that were quantized and of those that were refused."""
    lines = ["| class | linears | calls | quantized | kept | output SQNR dB |", "| --- | --: | --: | --: | --: | --: |"]
    for row in sorted(rows, key=lambda row: row["case"].lower()):
        if "refused" not in row:
            kept = sum(row["kept"].values())
            cells = (row["case"], row["linears"], row["calls"], row["quantized"], kept, row["sqnr"])
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| refused | because it | at |", "| --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: row["case"].lower()):
        if "refused" in row:
            places = re.findall(r"(?:\bat|capture:) (\S+\.py:\d+ `[^`]+`)", row["refused"])
            lines.append(f"| {row['case']} | {row['why']} | {places[-1] if places else '-'} |")
    return "\n".join(lines)


def heading(facts: dict[str, str]) -> str:
    """What the tables were made with."""
    return (
        f"torch {facts['torch']}, diffusers {facts['diffusers']}, fxq {facts['fxq']}, Python {facts['python']}, "
        f"{facts['processor']}, {facts['threads']} thread(s); seeds 0 (weights), 1 and 2 (calibration), 9 (measured)."
    )


def write_docs(path: pathlib.Path, text: str) -> None:
    """Put the text between the two marks of a page."""
    before, _, after = path.read_text(encoding="utf-8").split(MARK)
    path.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}", encoding="utf-8")


def main() -> None:
    """Measure all cases, or those whose name has one of the given words."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--docs", type=pathlib.Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for case in CASES:
        if any(word in case.name for word in options.only):
            rows.append(measure(case))
            print({name: value for name, value in rows[-1].items() if name != "refused"}, flush=True)
    facts = environment() | {"diffusers": diffusers.__version__}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": facts, "results": rows}, indent=1), encoding="utf-8")
    if options.docs is not None:
        write_docs(options.docs, f"{heading(facts)}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
