import json
import math

import pytest
from rich.console import Console

from fxq.bench.contest import BF16, FP32, CaseResult, Result
from fxq.bench.plot import write_plot
from fxq.bench.report import Report, case_table, layers_table, losing_rules, to_json

OK = {"status": "ok", "sqnr": 40.0}
CASE = CaseResult(
    "M7 96>70",
    {"rows": 7, "shape": (96, 70)},
    (
        Result(FP32, arithmetic="float32", seconds=(4.0, 4.0, 8.0, 4.0, 4.0), **OK),
        Result(BF16, arithmetic="bfloat16", seconds=(2.0, 2.0, 4.0, 2.0, 2.0), **OK),
        Result("ahead", seconds=(1.0, 1.0, 2.0, 1.0, 0.5), kernel="[brackets]", **OK),
        Result("planted", "wrong", "SQNR 3.0 dB, expected at least 25", sqnr=3.0),
        Result("broken", "failed", "RuntimeError: [no] compiler"),
        Result("absent", "skipped", "thing is not installed"),
        Result("fxq dual scale", seconds=(1.0, 2.0, 1.0, 1.0, 1.0), ours=True, **OK),
    ),
)
REPORT = Report("linear", {"threads": 1, "clock": "cpu", "rounds": 5, "allocator": "keep", "device": "cpu"}, (CASE,))


def printed(table):
    console = Console(width=170, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return {line.split("│")[1].strip(): line for line in capture.get().splitlines() if line.startswith("│")}


def test_the_table_shows_ratios_with_spread_and_no_times():
    line = printed(case_table(CASE))["ahead"]
    assert "4.00x (4.00-4.00)" in line
    assert "2.00x (2.00-2.00)" in line
    assert "[brackets]" in line
    assert "0.5" not in line


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("planted", "wrong: SQNR 3.0 dB, expected at least 25"),
        ("broken", "failed: RuntimeError: [no] compiler"),
        ("absent", "thing is not installed"),
    ],
)
def test_a_contestant_without_a_number_shows_why(name, why):
    line = printed(case_table(CASE))[name]
    assert why in line
    assert "x (" not in line


def test_json_has_every_round_and_the_conditions():
    data = json.loads(json.dumps(to_json(REPORT), allow_nan=False))
    results = {r["name"]: r for r in data["cases"][0]["results"]}
    assert results["ahead"]["seconds"] == [1.0, 1.0, 2.0, 1.0, 0.5]
    assert results["ahead"]["speed_over"][BF16] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert results["planted"]["speed_over"] == {}
    assert (data["threads"], data["allocator"], data["refused"]) == (1, "keep", True)
    assert {"torch", "processor", "capability"} <= set(data["environment"])
    assert data["cases"][0]["fastest_float"] == BF16
    assert data["least_sqnr"]["int8"] == 25.0


def test_an_output_that_is_not_finite_is_valid_json():
    case = CaseResult("case", {}, (Result("planted", "wrong", "SQNR -inf dB", sqnr=-math.inf),))
    data = to_json(Report("linear", {"threads": 1}, (case,)))
    assert "Infinity" not in json.dumps(data)


@pytest.mark.parametrize(
    ("result", "refused"),
    [
        (Result("rival", "failed"), False),
        (Result("rival", "skipped"), False),
        (Result("rival", "wrong"), True),
        (Result("fxq", "failed", ours=True), True),
    ],
)
def test_what_refuses_a_run(result, refused):
    assert Report("linear", {}, (CaseResult("case", {}, (result,)),)).refused is refused


def layer_result(name, rows, ours, layers):
    results = [Result(n, "ok", seconds=(s,) * 5) for n, s in ((FP32, 4.0), (BF16, 2.0), ("fxq", ours))]
    return CaseResult(f"M{rows} {name}", {"layers": layers, "rows": rows, "outliers": 0}, tuple(results))


def test_the_table_of_layers_says_which_lose():
    cases = [layer_result("96>64 W8", 1, 8.0, ["a", "b", "c"]), layer_result("64>96 W8", 75, 1.0, ["d"])]
    lines = printed(layers_table(cases))
    assert "a and 2 more" in lines["1"]
    assert "stay in bf16: M=1" in lines["1"]
    assert "stay" not in lines["75"]
    assert losing_rules(cases).count("[[rules]]") == 3
    advice = to_json(Report("model", {"threads": 1}, tuple(cases)))["advice"]
    assert [(a["layers"], a["stay"]) for a in advice] == [(("a", "b", "c"), "bf16"), (("d",), "")]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("count", [1, 4])
def test_the_picture_is_written_with_a_panel_a_case(tmp_path, suffix, count):
    path = write_plot([CASE] * count, tmp_path / "new" / f"bench{suffix}", "1 thread")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") if suffix == ".png" else b"</svg>" in data
    assert len(data) > 5000


def test_a_picture_without_a_baseline_has_no_bars_and_says_why(tmp_path):
    case = CaseResult("case", {}, (Result(BF16, "failed", "x"), Result("ahead", "ok", seconds=(1.0,) * 5)))
    assert write_plot([case], tmp_path / "bench.svg", "").exists()
