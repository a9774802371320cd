"""Tables and pass or fail of a GPU benchmark, from its JSON alone."""

from __future__ import annotations

import statistics
from typing import Any

DUAL, SINGLE = "fxq dual scale", "fxq single scale"
LEAST_GEMM, MOST_DUAL, LEAST_NORM = 1.6, 1.05, 2.5
LEAST_BLOCK, LEAST_ROLLOUT, GOAL_ROLLOUT = 1.5, 1.5, 1.74
BEST, STATIC = "the best bf16", "fxq, CUDA graph"

Step = dict[str, Any]
Bar = dict[str, Any]


def _row(step: Step, name: str) -> dict[str, Any]:
    return next((row for row in step["data"].get("results", ()) if row["name"] == name), {})


def _bar(step: Step, what: str, value: float | None, least: float, goal: float | None = None) -> Bar:
    passed = value is not None and value >= least
    return {"step": step["step"], "what": what, "value": value, "least": least, "goal": goal, "passed": passed}


def _speed(step: Step, name: str, opponent: str) -> float | None:
    ratio = _row(step, name).get("speed_over", {}).get(opponent)
    return None if ratio is None else ratio["median"]


def _over_best(step: Step, name: str) -> float | None:
    """Speed of a contestant over the fastest other one in bfloat16."""
    return _speed(step, name, step["data"].get("best_bf16", ""))


def _fastest_ours(step: Step) -> str:
    """The fastest contestant of this library, whatever its recipe; the static one where none was measured."""
    rows = [row for row in step["data"].get("results", ()) if row.get("ours") and row.get("seconds")]
    return min(rows, key=lambda row: statistics.median(row["seconds"]))["name"] if rows else STATIC


def _against_best(step: Step, name: str, least: float, goal: float | None = None) -> Bar:
    best = step["data"].get("best_bf16") or "not measured"
    return _bar(step, f"{name} over {BEST} ({best})", _over_best(step, name), least, goal)


def _memory(step: Step) -> Bar:
    facts = _row(step, STATIC).get("facts", {})
    peak, allowed = facts.get("peak_bytes"), facts.get("allowed_bytes")
    share = allowed / peak if peak and allowed else None
    return _bar(step, "0.55 of the weights in bf16 and the planned cache over the peak of W8A8", share, 1.0)


def bars(steps: list[Step]) -> list[Bar]:
    """What was promised; a value that is missing does not pass."""
    found = []
    for step in steps:
        section, name = step["step"].split("/", 1)
        if section == "gemm" and "8960" in name:
            found.append(_against_best(step, DUAL, LEAST_GEMM))
            found.append(_bar(step, f"{DUAL} over {SINGLE}", _speed(step, DUAL, SINGLE), 1 / MOST_DUAL))
        elif section == "bandwidth" and name.startswith("norm_quantize"):
            rate = _row(step, "fxq::norm_quantize").get("rates", {}).get("bytes")
            found.append(_bar(step, "TB/s", rate, LEAST_NORM))
        elif section == "block":
            found.append(_against_best(step, _fastest_ours(step), LEAST_BLOCK))
        elif section == "rollout":
            found.append(_against_best(step, _fastest_ours(step), LEAST_ROLLOUT, GOAL_ROLLOUT))
            found.append(_memory(step))
    return found


def _seconds(row: dict[str, Any]) -> str:
    if not row["seconds"]:
        return "-"
    middle = statistics.median(row["seconds"])
    return f"{middle * 1e6:.1f} us" if middle < 0.1 else f"{middle:.3f} s"


def _ratio(row: dict[str, Any], opponent: str) -> str:
    ratio = row["speed_over"].get(opponent)
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "-"


def _case(step: Step) -> list[str]:
    data = step["data"]
    opponents = data["opponents"]
    units = {"flop": "TFLOP/s", "bytes": "TB/s"}
    lines = [f"\n{step['step']}", "  ".join([f"{'':44}{'time':>12}", *(f"{name:>26}" for name in opponents)])]
    for row in data["results"]:
        rates = ", ".join(f"{value:.4g} {units[name]}" for name, value in row["rates"].items())
        cells = "  ".join([f"{row['name']:44}{_seconds(row):>12}", *(f"{_ratio(row, n):>26}" for n in opponents)])
        note = "" if row["status"] == "ok" else f"{row['status']}: {row['note']}"
        quality = "" if row["sqnr"] is None else f"{row['sqnr']:.1f} dB"
        lines.append(f"{cells}  {'; '.join(part for part in (rates, quality, note) if part)}")
    return lines


def _check(step: Step) -> str:
    data = step["data"]
    problem = data.get("error") or data.get("problem")
    verdict = f"FAILED: {problem}" if problem else f"agrees with its reference {data.get('kernel', '')}"
    return f"  {step['step'].split('/', 1)[1]:30}{verdict}"


def _bar_line(bar: Bar) -> str:
    value = "not measured" if bar["value"] is None else f"{bar['value']:.2f}"
    goal = "" if bar["goal"] is None else f", goal {bar['goal']:.2f}"
    verdict = "pass" if bar["passed"] else "FAIL"
    return f"  {verdict}  {bar['step']}: {bar['what']} {value} (at least {bar['least']:.2f}{goal})"


def _right(result: dict[str, Any]) -> bool:
    for step in result["steps"]:
        data = step["data"]
        if data.get("error") or data.get("problem"):
            return False
        for row in data.get("results", ()):
            if row["status"] == "wrong" or (row["ours"] and row["status"] == "failed"):
                return False
    return bool(result["complete"]) and not result["skipped"] and not result["deaths"]


def tables(result: dict[str, Any]) -> tuple[str, bool]:
    """The whole report as text, and whether nothing was wrong or lost; bars that fail are no error."""
    where = "DRY RUN on a CPU: no number was measured" if result["dry"] else result.get("gpu", "no GPU was reached")
    lines = [f"{where}; {result['date']}; {result['seconds']} s", result["command"], "\nchecks"]
    lines += [_check(step) for step in result["steps"] if step["step"].startswith("checks/")]
    for step in result["steps"]:
        if "results" in step["data"]:
            lines += _case(step)
        elif not step["step"].startswith("checks/"):
            lines.append(f"\n{step['step']}\n  failed: {step['data'].get('error', 'no result')}")
    for title, entries in (
        ("skipped", [f"  {entry['step']}: {entry['why']}" for entry in result["skipped"]]),
        ("deaths", [f"  {why}" for why in result["deaths"]]),
        ("bars", [_bar_line(bar) for bar in result["bars"]]),
    ):
        if entries:
            lines += [f"\n{title}", *entries]
    if not result["complete"]:
        lines.append("\nincomplete: the last worker did not reach the end")
    return "\n".join(lines), _right(result)
