import json

import pytest
import torch
import typer
from typer.testing import CliRunner

import fxq
from fxq.bench import cases, levels, rivals
from fxq.bench.contest import BASELINES, Built
from fxq.cli import bench as command
from fxq.cpu import no_bfloat16
from tests.toys import recipe, wan_rollout

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(command.bench)
QUICK = ("--quick", "--quiet", "--rounds", "5")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def results(text, case=0):
    return {r["name"]: r for r in json.loads(text)["cases"][case]["results"]}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cases, "QUICK_LINEARS", (cases.LinearShape(33, 96, 70),))


def planted(output):
    """A rival that returns what ``output`` makes of the right result."""

    def build(problem, threads):
        y = problem.module(*problem.args(torch.float32))
        return Built(lambda: output(y))

    return rivals.Rival("planted", build, dtype=torch.float32)


@pytest.mark.parametrize("level", ["linear", "block", pytest.param("rollout", marks=pytest.mark.sweep)])
def test_a_level_runs_and_this_library_is_right(level):
    # Through torch.compile it takes most of a minute: the test of `make test-all` below has every contestant.
    found = results(run("--level", level, *QUICK, "--only", "fxq dual*", "--json", "-").stdout)
    ours = found["fxq dual scale"]
    assert set(BASELINES) < set(found)
    assert ours["status"] == "ok", ours["note"]
    assert ours["sqnr"] >= cases.LEAST_SQNR[level]["int8"]
    assert len(ours["seconds"]) == 5
    assert set(ours["speed_over"]) == set(BASELINES)
    assert any(ours["facts"]["outliers"].values()), "the dual-scale path did not run"
    assert "dual_scale_linear" in str(ours["facts"]["operators"])


@pytest.fixture
def toy_model(monkeypatch):
    monkeypatch.setattr(command, "make_rollout", lambda name, videos, seed: wan_rollout())


def test_the_model_level_names_layers_and_rows(toy_model, tmp_path):
    path = tmp_path / "results" / "model.json"
    text = run("--level", "model", *QUICK, "--json", str(path)).stdout
    assert "text_embedding.0" in text
    data = json.loads(path.read_text())
    assert data["cases"][0]["facts"]["rows"] == 10
    assert [a["layers"] for a in data["advice"]] == [case["facts"]["layers"] for case in data["cases"]]


def test_the_model_level_takes_a_bundle(toy_model, tmp_path):
    rollout = wan_rollout()
    fxq.save(fxq.quantize(rollout.denoiser, rollout, recipe(bits=4), progress=False), tmp_path / "bundle")
    data = json.loads(run("--level", "model", "--bundle", str(tmp_path / "bundle"), *QUICK, "--json", "-").stdout)
    assert all("W4" in case["name"] for case in data["cases"])


def test_the_model_level_measures_only_the_cases_asked_for(toy_model):
    data = json.loads(run("--level", "model", *QUICK, "--case", "M24 64>96*", "--json", "-").stdout)
    assert [case["facts"]["layers"] for case in data["cases"]] == [["blocks.0.ffn.0"]]


@pytest.mark.sweep
@pytest.mark.parametrize("level", ["linear", "block", "rollout"])
def test_every_contestant_of_a_level_is_right_or_not_for_this_machine(level):
    data = json.loads(run("--level", level, *QUICK, "--json", "-").stdout)
    for case in data["cases"]:
        bad = {r["name"]: (r["status"], r["note"]) for r in case["results"] if r["status"] not in ("ok", "skipped")}
        assert not bad
        skipped = [r for r in case["results"] if r["status"] == "skipped"]
        absent = [r["name"] for r in skipped if r["note"].startswith("not on this CPU")]
        needless = [r["name"] for r in skipped if r["note"] == "products with int8 weights are exact on this CPU"]
        assert set(needless) <= {"onnxruntime MatMulInteger u8"}
        assert all("is not installed" in r["note"] for r in skipped if r["name"] not in (*absent, *needless))
        assert absent == ["bf16 oneDNN"] * bool(no_bfloat16())


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (lambda y: y * 1.1, "wrong: SQNR 20.0 dB, expected at least 25"),
        (lambda y: y[..., :-1], "wrong: output is (1, 33, 69), the reference (1, 33, 70)"),
    ],
)
def test_a_wrong_contestant_gets_no_ratio_and_exit_code_1(small, monkeypatch, output, why):
    monkeypatch.setattr(levels, "rivals_for", lambda *_: (*rivals.RIVALS[:2], planted(output)))
    text = run(*QUICK, code=1).stdout
    line = next(line for line in text.splitlines() if "planted" in line)
    assert why in line
    assert "x (" not in line
    assert "x (" in next(line for line in text.splitlines() if "fxq dual scale" in line)


def test_a_failing_rival_is_shown_and_the_run_passes(small, monkeypatch):
    def breaks(y):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(levels, "rivals_for", lambda *_: (*rivals.RIVALS[:2], planted(breaks)))
    assert "failed: RuntimeError: no luck" in run(*QUICK).stdout


def test_rivals_that_are_not_installed_are_named(small, monkeypatch):
    monkeypatch.setattr("fxq.bench.contest.installed", lambda package: False)
    found = results(run(*QUICK, "--only", "torchao*", "--only", "onnx*", "--json", "-").stdout)
    assert found["torchao dynamic int8"]["note"] == "torchao is not installed: pip install 'fxq[bench]'"
    assert found["onnxruntime QDQ"]["note"] == "onnxruntime is not installed: pip install 'fxq[bench]'"
    assert found["onnxruntime QDQ"]["status"] == "skipped"


def test_only_the_cases_asked_for_are_measured(monkeypatch):
    monkeypatch.setattr(cases, "QUICK_LINEARS", tuple(cases.LinearShape(rows, 96, 70) for rows in (33, 17, 34)))
    data = json.loads(run(*QUICK, "--only", "fxq dual*", "--case", "M3*", "--json", "-").stdout)
    assert [case["name"] for case in data["cases"]] == ["M33 96>70", "M34 96>70"]


def test_linears_have_the_rows_asked_for(monkeypatch):
    monkeypatch.setattr(cases, "_WAN", ((96, 70, "attention"),))
    arguments = ("--rows", "3", "--rows", "33", "--rounds", "5", "--only", "fxq dual*", "--case", "*attention")
    data = json.loads(run("--quiet", *arguments, "--json", "-").stdout)
    assert [case["name"] for case in data["cases"]] == ["M3 96>70 attention", "M33 96>70 attention"]


def test_the_picture_is_written(small, tmp_path):
    run(*QUICK, "--only", "fxq*", "--plot", str(tmp_path / "bench.png"))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_kept_memory_is_recorded(small, monkeypatch):
    monkeypatch.setattr(command, "keep_memory", lambda: True)
    assert json.loads(run(*QUICK, "--only", "fxq*", "--allocator", "keep", "--json", "-").stdout)["allocator"] == "keep"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--only", "nobody"), "'nobody' matches no contestant"),
        (("--rounds", "4"), "Invalid value for '--rounds'"),
        (("--case", "M2 *"), "'M2 *' matches no case; there are: M33 96>70"),
        (("--plot", "bench.txt"), "expected a name that ends in .png"),
        (("--bundle", "somewhere"), "--bundle is for --level model"),
        (("--allocator", "keep"), "the C library is not glibc"),
        (("--rows", "3"), "--rows is for --level linear without --quick"),
        (("--rows", "0"), "Invalid value for '--rows'"),
    ],
)
def test_wrong_usage_is_refused_with_a_reason(small, monkeypatch, arguments, why):
    monkeypatch.setattr(command, "keep_memory", lambda: False)
    monkeypatch.setenv("COLUMNS", "300")
    result = run("--quick", "--quiet", *arguments, code=2)
    assert why in " ".join(result.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused():
    assert "sees no GPU" in run("--quick", "--device", "cuda", code=2).output
