"""Results as JSON and as tables of ratios; seconds stay in the JSON, machines differ too much to show them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text

from fxq.bench.cases import LEAST_SQNR
from fxq.bench.contest import BASELINES, CaseResult, Result
from fxq.bench.layers import advise, rules_text
from fxq.environment import environment

_PACKAGES = ("torchao", "onnx", "onnxruntime", "openvino", "gemlite", "triton")


@dataclass(frozen=True)
class Report:
    """A run of the benchmark: what was asked, where it ran, and what came out."""

    level: str
    settings: dict[str, object]
    cases: tuple[CaseResult, ...]

    @property
    def refused(self) -> bool:
        """Whether a result was wrong, or this library failed."""
        return any(result.refused for case in self.cases for result in case.results)


def versions() -> dict[str, str]:
    """Versions of the installed packages that contestants come from."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _opponents(case: CaseResult) -> list[str]:
    """The baselines and the fastest float contestant."""
    return list(dict.fromkeys([*BASELINES, *([case.fastest_float] if case.fastest_float else [])]))


def _result_json(case: CaseResult, result: Result) -> dict[str, object]:
    ratios = {name: case.ratio(result.name, name) for name in _opponents(case)}
    finite = result.sqnr is not None and math.isfinite(result.sqnr)
    return {
        **dataclasses.asdict(result),
        "sqnr": result.sqnr if finite else None,
        "seconds": list(result.seconds),
        "speed_over": {name: dataclasses.asdict(r) for name, r in ratios.items() if r is not None},
    }


def to_json(report: Report) -> dict[str, object]:
    """Everything: settings, environment, versions and every round's seconds per call."""
    advice = [dataclasses.asdict(a) for case in report.cases if report.level == "model" and (a := advise(case))]
    return {
        "level": report.level,
        **report.settings,
        "environment": {
            **environment(),
            "threads": str(report.settings["threads"]),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": versions(),
        "least_sqnr": LEAST_SQNR[report.level],
        "refused": report.refused,
        "advice": advice,
        "cases": [
            {
                "name": case.name,
                "fastest_float": case.fastest_float,
                "facts": {key: _plain(value) for key, value in case.facts.items()},
                "results": [_result_json(case, result) for result in case.results],
            }
            for case in report.cases
        ],
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def case_table(case: CaseResult) -> Table:
    """Speed over the two eager baselines and the fastest float, accuracy, and what ran or why there is no number."""
    fastest = case.fastest_float
    table = Table(title=case.name, title_justify="left")
    table.add_column("speed over", no_wrap=True)
    for name in BASELINES:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"fastest float: {fastest}" if fastest else "fastest float", justify="right")
    table.add_column("SQNR dB", justify="right")
    table.add_column("kernel, or why there is no number")
    for result in case.results:
        ratios = [case.ratio(result.name, name) for name in (*BASELINES, fastest or "")]
        cells = ["-" if ratio is None else str(ratio) for ratio in ratios]
        quality = "-" if result.sqnr is None else f"{result.sqnr:.1f}"
        # Kernels and exceptions are foreign text: brackets in them are no markup.
        table.add_row(result.name, *cells, quality, Text(_remark(result)), style=_style(result))
    return table


def _remark(result: Result) -> str:
    if result.status == "ok":
        return result.kernel
    return result.note if result.status == "skipped" else f"{result.status}: {result.note}"


def _style(result: Result) -> str | None:
    if result.status == "ok":
        return "bold" if result.ours else None
    return "dim" if result.status == "skipped" else "red"


def layers_table(cases: Sequence[CaseResult]) -> Table:
    """Per shape of layer: int8 over the two float linears, and where it loses."""
    table = Table(title="quantize and integer linear against F.linear, by layer shape")
    for name in ("rows", "shape", "outliers", "layers"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    for name in BASELINES:
        table.add_column(f"speed over {name.split()[0]}", justify="right", no_wrap=True)
    table.add_column("advice")
    for case in cases:
        ours = case.results[-1]
        layers = case.facts["layers"]
        shown = layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"
        ratios = [case.ratio(ours.name, name) for name in BASELINES]
        cells = ["-" if ratio is None else str(ratio) for ratio in ratios]
        advice = advise(case)
        text = Text(_remark(ours) if advice is None else advice.text)
        rows, outliers = str(case.facts["rows"]), str(case.facts["outliers"] or "-")
        table.add_row(rows, case.name.split()[1], outliers, shown, *cells, text, style=_style(ours))
    return table


def losing_rules(cases: Sequence[CaseResult]) -> str:
    """Rules for a recipe file that keep in floating point what int8 makes slower; "" when nothing does."""
    return rules_text(advice for case in cases if (advice := advise(case)) is not None)
