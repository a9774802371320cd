import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

import fxq
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import floats
from benchmarks.gpu import rollout as gpu_rollout
from benchmarks.gpu import worker as gpu_worker
from benchmarks.gpu.attention import sdpa
from benchmarks.gpu.block import Quantized, block_entries
from benchmarks.gpu.graphs import DeviceClock, copies, replayed
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.memory import allowed_bytes, memory_facts
from benchmarks.gpu.problems import DRY, WAN, Layer
from benchmarks.gpu.recipes import recipes
from benchmarks.gpu.session import Entry, Session, fastest_bf16
from benchmarks.gpu.tables import bars, tables
from fxq import kernels
from fxq.bench.cases import BlockShape
from fxq.bench.contest import CaseResult, Result
from fxq.bench.problems import block_problem
from fxq.calibration.rollout import Draws

ROOT = pathlib.Path(__file__).resolve().parents[2]
ONES = torch.ones(4)


def session(tmp_path, dry=False, left=100.0):
    sections = dict.fromkeys(("checks", "gemm"), left)
    return Session("cpu", dry, 3, Journal(tmp_path / "journal.jsonl"), time.time(), left, sections)


def contest(run, entries, opponents=("a",)):
    run.step("gemm", "case", lambda step: run.contest(step, lambda: ONES, entries, opponents, work={"flop": 2e12}))
    return {row["name"]: row for row in run.journal.of("done")[-1]["data"]["results"]}


def returning(name, value=ONES, **more):
    return Entry(name, lambda: lambda: value, **more)


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param(("checks", "bandwidth"), marks=pytest.mark.sweep),
        pytest.param(gpu.SECTIONS, marks=pytest.mark.sweep, id="all"),
    ],
)
def test_a_dry_run_goes_through_its_sections_and_holds_no_number(tmp_path, sections):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(out), "--sections", *sections]
    command += ["--budget", "2000"]  # what the time does not reach is skipped, and a slow machine is no failure
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN on a CPU: no number was measured" in done.stdout
    result = json.loads(out.read_text())
    assert result["dry"] and result["complete"] and not result["skipped"] and not result["bars"]
    assert {"torch", "python"} <= result["environment"].keys()
    assert {step["step"].split("/")[0] for step in result["steps"]} == set(sections)
    rows = [row for step in result["steps"] for row in step["data"].get("results", ())]
    assert {row["status"] for row in rows if row["ours"]} == {"ok"}
    assert {row["status"] for row in rows} <= {"ok", "skipped", "failed"}
    assert not any(row["seconds"] or row["rates"] or row["speed_over"] for row in rows)
    assert not any(mark in done.stdout for mark in ("TFLOP/s", "TB/s", "1.00x", "pass", "FAIL"))


def test_a_contestant_whose_kernel_was_not_checked_is_not_run(tmp_path):
    ran = []
    rows = contest(session(tmp_path), [returning("a"), Entry("b", lambda: ran.append(1), uses=("attention",))])
    assert rows["b"]["status"] == "wrong" and rows["b"]["note"] == "check of attention: was not run"
    assert not ran and not rows["b"]["seconds"] and rows["a"]["seconds"]


@pytest.mark.parametrize(
    ("data", "note"),
    [
        ({"problem": "integers differ by up to 2"}, "check of attention: integers differ by up to 2"),
        ({"error": "RuntimeError: no"}, "check of attention: RuntimeError: no"),
        ({"problem": ""}, ""),
    ],
)
def test_a_failed_check_takes_the_speed_away(tmp_path, data, note):
    run = session(tmp_path)
    run.step("checks", "attention", lambda step: data)
    rows = contest(run, [returning("a"), returning("b", uses=("attention",))])
    assert rows["b"]["note"] == note
    assert bool(rows["b"]["speed_over"]) == (not note)


def test_a_wrong_or_failing_contestant_leaves_the_others_their_numbers(tmp_path):
    def fails():
        raise RuntimeError("first line\nsecond line")

    rows = contest(session(tmp_path), [returning("a"), returning("b", 2 * ONES), Entry("c", fails)])
    assert [rows[name]["status"] for name in "abc"] == ["ok", "wrong", "failed"]
    assert rows["b"]["note"] == "SQNR 0.0 dB, expected at least 25"
    assert rows["c"]["note"] == "RuntimeError: first line"
    assert rows["a"]["seconds"] == [1.0] * 3 and rows["a"]["rates"] == {"flop": 2.0}
    assert rows["a"]["speed_over"]["a"]["median"] == 1.0


def test_the_tables_show_time_rate_ratio_and_why_a_number_is_missing(tmp_path):
    run = session(tmp_path)
    contest(run, [returning("a"), returning("b", 2 * ONES)])
    result = gpu.collect(run.journal, argparse.Namespace(dry=False), 1.0)
    text, right = tables(result)
    assert not right and not result["complete"]
    row_a, row_b = (next(line for line in text.splitlines() if line.startswith(name)) for name in ("a ", "b "))
    assert row_a.split() == ["a", "1.000", "s", "1.00x", "(1.00-1.00)", "2", "TFLOP/s;", "200.0", "dB"]
    assert row_b.split()[:3] == ["b", "-", "-"] and "wrong: SQNR 0.0 dB, expected at least 25" in row_b


def test_a_dry_session_keeps_no_seconds(tmp_path):
    rows = contest(session(tmp_path, dry=True), [returning("a")])
    assert rows["a"]["status"] == "ok"
    assert not rows["a"]["seconds"] and not rows["a"]["rates"] and not rows["a"]["speed_over"]


def test_steps_out_of_time_are_listed_and_errors_kept(tmp_path):
    late = session(tmp_path, left=-1.0)
    late.step("gemm", "case", lambda step: {})
    assert late.journal.of("skip")[0]["why"] == "out of time: -1 s after the start"
    run = session(tmp_path)
    run.step("gemm", "other", lambda step: 1 / 0)
    assert run.journal.of("done")[0]["data"] == {"error": "ZeroDivisionError: division by zero"}


def test_a_contestant_that_takes_longer_than_is_left_is_not_begun(tmp_path):
    rows = contest(session(tmp_path), [returning("a"), returning("b", takes=1000.0)])
    assert rows["b"]["status"] == "failed" and "it takes about 1000" in rows["b"]["note"]


def test_a_step_that_is_done_is_not_done_again(tmp_path):
    for value in (1, 2):
        session(tmp_path).step("gemm", "case", lambda step, value=value: {"value": value})
    assert [line["data"] for line in Journal(tmp_path / "journal.jsonl").of("done")] == [{"value": 1}]


KILLER = """
import os, pathlib, sys, time, torch
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.session import Entry, Session
journal = Journal(pathlib.Path(sys.argv[1]))
session = Session("cpu", False, 2, journal, time.time(), 100.0, {"gemm": 100.0})
one = torch.ones(4)
entries = [Entry("good", lambda: lambda: one), Entry("bad", lambda: os._exit(9))]
session.step("gemm", "first", lambda step: os._exit(7) if sys.argv[2] == "step" else {})
session.step("gemm", "second", lambda step: session.contest(step, lambda: one, entries, ("good",)))
journal.write("end")
"""


@pytest.mark.sweep
def test_a_kernel_that_kills_the_process_costs_itself_alone(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = gpu.drive(path, [sys.executable, "-c", KILLER, str(path), "step"], time.time() + 200)
    assert [line["why"] for line in journal.of("died")] == [f"the process died with exit code {n}" for n in (7, 9)]
    assert journal.of("skip") == [{"kind": "skip", "step": "gemm/first", "why": "the process died with exit code 7"}]
    good, bad = journal.of("done")[0]["data"]["results"]
    assert good["status"] == "ok" and good["seconds"]
    assert (bad["status"], bad["note"]) == ("wrong", "the process died with exit code 9")
    assert journal.of("end")


@pytest.mark.parametrize(("silence", "seconds", "why"), [(0.3, 60.0, "nothing happened"), (60.0, 0.3, "out of time")])
def test_a_worker_that_hangs_is_ended(tmp_path, monkeypatch, silence, seconds, why):
    monkeypatch.setattr(gpu, "SILENCE", silence)
    path = tmp_path / "journal.jsonl"
    journal = gpu.drive(path, [sys.executable, "-c", "import time; time.sleep(60)"], time.time() + seconds)
    assert why in journal.of("died")[0]["why"]
    assert len(journal.of("died")) == 1


def test_a_torn_line_of_the_journal_is_ignored(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).write("start", step="gemm/case")
    path.write_text(path.read_text() + '{"kind": "do')
    assert [line["kind"] for line in Journal(path).lines] == ["start"]


def test_a_death_while_timing_costs_the_step(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("start", step="gemm/case")
    journal.write("at", step="gemm/case", contestant="a")
    journal.write("at", step="gemm/case", contestant="")
    journal.bury("hung")
    assert journal.finished == {"gemm/case"} and not journal.killers("gemm/case")


def _step(name, results):
    rows = [{"name": n, "speed_over": {k: {"median": v} for k, v in over.items()}} for n, over in results.items()]
    return {"step": name, "data": {"results": rows}}


def _timed(step):
    """The rows with seconds, so that the fastest is known; the best of others in bfloat16 is the first row."""
    for i, row in enumerate(step["data"]["results"]):
        row.update(ours=row["name"].startswith("fxq"), seconds=[2.0 - 0.1 * i] * 3)
    step["data"]["best_bf16"] = step["data"]["results"][0]["name"]
    return step


def test_bars_pass_at_their_bounds_and_fail_below_or_without_a_value():
    linear = {"cuBLAS bf16": {}, "fxq dual scale": {"cuBLAS bf16": 1.6, "fxq single scale": 0.953}}
    good = _timed(_step("gemm/M4680 1536>8960", linear))
    linear["fxq dual scale"] = {"cuBLAS bf16": 1.59, "fxq single scale": 0.95}
    bad = _timed(_step("gemm/M4680 8960>1536", linear))
    other = _step("gemm/M4680 1536>1536", {"fxq dual scale": {"cuBLAS bf16": 0.5}})
    lost = _step("rollout/7 chunks", {"bf16 eager": {}})
    found = bars([good, bad, other, lost])
    assert [bar["passed"] for bar in found] == [True, True, False, False, False, False]
    assert [bar["value"] for bar in found[-2:]] == [None, None]


@pytest.mark.parametrize(("section", "bounds"), [("block", {1.5: True, 1.49: False}), ("rollout", {1.5: True})])
def test_the_fastest_recipe_is_measured_by_the_best_of_others_in_bfloat16(section, bounds):
    for value, passed in bounds.items():
        over = {"bf16 compiled, cuDNN attention, CUDA graph": value, "bf16 eager": 9.0}
        rows = {"bf16 compiled, cuDNN attention, CUDA graph": {}, "bf16 eager": {}, "fxq, CUDA graph": {}}
        found = bars([_timed(_step(f"{section}/x", {**rows, "fxq, attention in int8, CUDA graph": over}))])[0]
        assert (found["value"], found["passed"]) == (value, passed)
        assert found["what"] == (
            "fxq, attention in int8, CUDA graph over the best bf16 (bf16 compiled, cuDNN attention, CUDA graph)"
        )
    assert bars([_step(f"{section}/x", {})])[0]["what"] == "fxq, CUDA graph over the best bf16 (not measured)"


@pytest.mark.parametrize(("peak", "passed"), [(100, True), (101, False)])
def test_memory_is_measured_by_the_plan(peak, passed):
    step = _step("rollout/x", {"fxq, CUDA graph": {}})
    step["data"]["results"][0]["facts"] = {"peak_bytes": peak, "allowed_bytes": 100}
    assert [bar["passed"] for bar in bars([step])] == [False, passed]


def test_the_best_in_bfloat16_is_the_fastest_that_is_not_ours_and_was_right():
    def row(name, seconds, arithmetic="bfloat16", ours=False):
        return Result(name, "ok" if seconds else "wrong", arithmetic=arithmetic, ours=ours, seconds=seconds)

    rows = (row("a", (3.0, 3.0)), row("b", (2.0, 9.0, 2.0)), row("c", (1.0,), "int8"), row("d", (1.0,), ours=True))
    assert fastest_bf16(CaseResult("x", {}, (*rows, row("wrong", ())))) == "b"
    assert fastest_bf16(CaseResult("x", {}, rows[2:])) == ""


def test_models_run_the_attention_that_is_asked_for_and_their_own_afterwards(monkeypatch):
    calls = []
    monkeypatch.setattr(floats, "cudnn", lambda q, k, v: calls.append(1) or sdpa(q, k, v))
    floats.flat_attention.cache_clear()
    config = dataclasses.replace(DRY.config, dim=64, ffn_dim=64, num_heads=2)
    problem = block_problem(BlockShape(1, (2, 3), 12, config), "cpu")
    args = problem.args(torch.float32)
    want = problem.module(*args)[0]
    with floats.attending(floats.CUDNN):
        got = problem.module(*args)[0]
    assert len(calls) == 2 and torch.equal(got, want)  # to the cache, and to the text
    assert torch.equal(problem.module(*args)[0], want) and len(calls) == 2
    assert floats.flat_attention(floats.CUDNN) is floats.flat_attention(floats.CUDNN)
    floats.flat_attention.cache_clear()


def test_recipes_that_compete_are_those_and_take_integers_in_attention():
    found = recipes()
    assert list(found) == ["fxq", "fxq, scales per token", "fxq, attention in int8"]
    schemes = [recipe.rules[-1].scheme for recipe in found.values()]
    assert [scheme.per_token for scheme in schemes] == [False, True, False] and all(s.dual_scale for s in schemes)
    assert [recipe.attention is not None for recipe in found.values()] == [False, False, True]
    blocks = Quantized(DRY, "cpu")
    targets = {node.target for node in blocks.module(60, "fxq, attention in int8").graph.nodes}
    assert kernels.attention_int8.definition in targets and kernels.attention.definition not in targets


def test_all_recipes_and_attentions_run_a_chunk_and_the_first_of_them_other_rows():
    sizes = dataclasses.replace(DRY, rows=(60, 20))
    blocks, problem = Quantized(sizes, "cpu"), mock.MagicMock()
    names = {rows: [entry.name for entry in block_entries(blocks, rows, problem, True)] for rows in sizes.rows}
    assert set(names[60]) - set(names[20]) == {
        "fxq, scales per token, CUDA graph",
        "fxq, attention in int8, CUDA graph",
        "bf16 compiled, cuDNN attention, CUDA graph",
        "bf16 compiled, FlashAttention-3, CUDA graph",
    }
    assert {"fxq, CUDA graph", "bf16 compiled, CUDA graph"} <= set(names[20])
    assert all(len(set(found)) == len(found) for found in names.values())


def test_memory_is_allowed_for_half_the_weights_the_cache_and_a_call():
    config = dataclasses.replace(DRY.config, dim=64, ffn_dim=64, num_heads=2)
    rollout = gpu_rollout.make_rollout(dataclasses.replace(DRY, config=config), "cpu")
    weights = sum(p.numel() for p in rollout.model.parameters()) * 2
    cache = 2 * 120 * 64 * 2 + 2 * 16 * 64 * 2  # keys and values of two chunks, and of the text
    allowed = allowed_bytes(rollout)
    assert 0 < allowed - 0.55 * weights - cache < 0.5 * weights
    assert memory_facts(rollout.model, lambda: None, rollout) == {}


def test_a_failed_check_fails_the_run_and_a_failed_bar_does_not():
    result = {
        "dry": False, "gpu": "a GPU", "date": "", "seconds": 1, "command": "", "complete": True, "deaths": [],
        "skipped": [], "bars": bars([_step("rollout/x", {})]),
        "steps": [{"step": "checks/attention", "data": {"problem": ""}}],
    }  # fmt: skip
    text, right = tables(result)
    assert (
        right
        and "FAIL  rollout/x: fxq, CUDA graph over the best bf16 (not measured) not measured (at least 1.50, goal 1.74)"
        in text
    )
    result["steps"][0]["data"]["problem"] = "differs"
    text, right = tables(result)
    assert not right and "FAILED: differs" in text


@pytest.mark.parametrize(
    ("got", "want", "max_error", "problem"),
    [
        (ONES, ONES * 1.1, 0.2, ""),
        (ONES, ONES * 1.1, 0.01, "differs by 0.091 of the largest value, allowed 0.01"),
        (ONES.to(torch.int8), 2 * ONES.to(torch.int8), 0.1, "integers differ by up to 1, 100.00% of them"),
        (ONES, ONES.double(), 0.1, r"is torch.float32 (4,), the reference torch.float64 (4,)"),
        (ONES * float("nan"), ONES, 0.1, "differs by nan of the largest value, allowed 0.1"),
    ],
)
def test_what_counts_as_disagreement(got, want, max_error, problem):
    assert gpu_checks.disagreement(got, want, max_error) == problem


def test_one_integer_in_many_may_differ_by_one_where_the_operator_allows_it():
    want = torch.zeros(1000, dtype=torch.int8)
    got = want.clone()
    got[3] = 1
    assert gpu_checks.disagreement(got, want, 0.01) == ""
    assert "differ by up to 1" in gpu_checks.disagreement(got, want, 0.0)


def test_a_wrong_kernel_is_found_by_the_check_of_tiles():
    def wrong(operands, dtype):
        return gpu_checks.triton_linear(gpu_checks.SWEPT[0], operands, dtype) * 1.1

    assert "(333, 512) x (200, 512): differs by" in gpu_checks.check_tiles(wrong, DRY, "cpu")["problem"]


def test_only_wrapped_calls_move_the_clock():
    clock = DeviceClock("cpu")
    call = clock.timed(lambda: "result", cold=True)
    time.sleep(0.01)
    assert clock() == 0.0
    assert call() == "result"
    assert clock() == 1.0


def test_without_a_gpu_the_function_itself_is_called_and_two_copies_rotate():
    assert replayed(len, "cpu") is len
    assert len(copies(ONES)) == 2


def test_on_a_gpu_calls_are_replayed_from_graphs_and_single_operators_keep_their_memory(monkeypatch):
    made = mock.MagicMock()
    monkeypatch.setattr(fxq, "CudaGraphs", made)
    assert replayed(len, "cuda") is made.return_value
    made.assert_called_once_with(len, device="cuda", fresh_outputs=True)
    run = Session("cpu", False, 2, mock.MagicMock(), 0.0, 1.0, {})
    run.device = "cuda"
    run._built(Entry("a", lambda: lambda: ONES))
    assert made.call_args.kwargs == {"device": "cuda", "fresh_outputs": False}


def test_the_time_of_a_call_is_that_between_its_events(monkeypatch):
    events = mock.MagicMock()
    events.return_value.elapsed_time.return_value = 2.5
    monkeypatch.setattr(torch.cuda, "Event", events)
    monkeypatch.setattr(torch.cuda, "synchronize", mock.MagicMock())
    clock = DeviceClock("cpu")
    clock._scratch = ONES.clone()
    clock.timed(lambda: None, cold=False)()
    assert torch.equal(clock._scratch, ONES)
    clock.timed(lambda: None, cold=True)()
    assert not clock._scratch.any()
    assert clock() == clock() == pytest.approx(0.005)


@pytest.mark.parametrize("sizes", [DRY, WAN], ids=["dry", "Wan"])
def test_sizes_fit_whole_frames_and_packed_weights(sizes):
    tokens = sizes.grid[0] * sizes.grid[1]
    assert all(rows % tokens == 0 for rows in sizes.rows)
    assert sizes.rows[0] == 3 * tokens
    assert {width for width, _ in sizes.linears} == sizes.outliers.keys()
    assert all(width % 32 == outliers % 32 == 0 for width, outliers in sizes.outliers.items())


def test_the_sampler_makes_noise_and_tables_once_and_gets_those_of_the_library():
    sizes = dataclasses.replace(DRY, config=dataclasses.replace(DRY.config, dim=64, ffn_dim=64, num_heads=2))
    rollout = gpu_rollout.make_rollout(sizes, "cpu")
    draws, plain = rollout.batches[0][1], Draws([1], rollout.batches[0][1].shape)
    assert torch.equal(draws.noise, plain.noise) and draws.noise is draws.noise
    assert torch.equal(draws.renoise(1, 0, 3), plain.renoise(1, 0, 3))
    tables = gpu_rollout.device_tables("cpu")
    expected = rollout.rollout(*rollout.batches[0])
    with gpu_rollout.sampling_with(tables):
        assert torch.equal(rollout.rollout(*rollout.batches[0]), expected)
    assert tables.cache_info().currsize == sizes.chunks


def test_two_scales_are_more_accurate_than_one_and_four_bits_less_than_eight():
    layer = Layer.random(40, 512, 64, 32, "cpu")
    rows = torch.arange(40)
    errors = []
    for operands in (layer.integers(), layer.integers(dual=False), layer.integers(bits=4)):
        y = gpu_checks.triton_linear(gpu_checks.SWEPT[0], operands, torch.float32)
        errors.append(float((y - layer.exact(rows)).norm()))
    assert errors[0] < errors[1] < errors[2]


def test_the_run_ends_within_eight_minutes_and_sections_start_in_order():
    assert tuple(gpu_worker.SECTIONS) == gpu.SECTIONS == tuple(gpu_worker.SHARES)
    assert gpu.BUDGET + gpu.GRACE < 480
    times = list(gpu_worker.deadlines(gpu.BUDGET).values())
    assert times == sorted(times) and times[-1] < gpu.BUDGET


def test_the_command_of_the_worker_takes_the_options_along():
    args = argparse.Namespace(budget=10.0, sections=["checks", "gemm"], dry=True)
    command = gpu.worker_command(pathlib.Path("journal"), args)
    assert command[-4:] == ["--sections", "checks", "gemm", "--dry"]
