import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import fxq
from fxq import cli
from fxq.cli.generate import generated
from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny
from fxq.passes.measured import float_where_faster
from tests import published


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fxq", *arguments], capture_output=True, text=True, timeout=500)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("cli") / "bundle")
    data = json.loads(
        invoke("quantize", "--out", out, "--recipe", "w8a8", "--videos", "2", "--iterations", "2", "--quiet", "--json")
    )
    assert data["quantized"] == 42
    assert data["kept"] == 4
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a model of one block in the published form."""
    return published.options(tmp_path_factory.mktemp("small"))


def test_help_names_every_command():
    text = invoke("--help")
    names = "demo quantize inspect sensitivity generate bench export verify plan doctor"
    for command in names.split():
        assert command in text


def test_quantize_writes_a_bundle_that_loads(bundle):
    module = fxq.load(bundle)
    assert fxq.summary(module).facts["recipe"]["name"] == "w8a8"


def test_a_folder_is_printed_as_it_is_named(small, tmp_path):
    out = tmp_path / "a[bold]b"
    said = invoke("quantize", *small, "--recipe", "w8a8-dynamic", "--out", str(out), "--quiet")
    assert said.endswith(f"\nbundle: {out}\n")


def test_inspect_shows_a_bundle(bundle):
    assert "blocks.0.self_attn.q" in invoke("inspect", bundle)
    layers = json.loads(invoke("inspect", bundle, "--json"))["layers"]
    assert {row["layer"] for row in layers if not row["quantized"]} == {
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "head.head",
        "patch_embedding",
    }


@pytest.mark.sweep
def test_a_budget_chooses_bits_and_the_saved_recipe_gives_the_same_bundle(small, tmp_path):
    (tmp_path / "quick.json").write_text(json.dumps({"extends": "w4a8", "methods": [{"method": "RangeSearch"}]}))
    common = [*small, "--videos", "2", "--quiet"]
    file, words = str(tmp_path / "plain.toml"), ["--recipe", str(tmp_path / "quick.json"), "--bits-per-weight", "5"]
    text = invoke("quantize", "--out", str(tmp_path / "a"), *words, "--save-recipe", file, *common)
    assert "W8A8" in text and "W4A8" in text and "predicted error" in text
    assert " bits per weight, " in text and "bytes" in text
    data = json.loads(invoke("quantize", "--out", str(tmp_path / "b"), "--recipe", file, *common, "--json"))
    assert "widths" not in data["facts"] and "budget" not in data["facts"]["recipe"]
    a, b = (fxq.load(tmp_path / name).state_dict() for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    found = json.loads(invoke("inspect", str(tmp_path / "a"), "--json"))["facts"]["widths"]
    assert found["bits_per_weight"] <= 5 and found["frontier"][0][0] < found["bytes"] < found["frontier"][-1][0]
    ratio = json.loads(
        invoke("quantize", "--out", str(tmp_path / "c"), *words[:2], "--budget", str(found["ratio"]), *common, "--json")
    )
    assert ratio["facts"]["widths"]["layers"] == found["layers"]


def test_inspect_shows_a_plan_without_data():
    rows = json.loads(invoke("inspect", "tiny", "--recipe", "w4a6", "--json"))
    by_layer = {row["layer"]: row for row in rows}
    assert by_layer["blocks.0.ffn.0"]["bits"] == "W4A6"
    assert by_layer["head.head"]["reason"] == "prediction head: tiny and sensitive"
    assert all(row["outliers"] % 32 == 0 for row in rows)
    assert "threshold" in invoke("inspect", "tiny")


def test_inspect_shows_what_a_budget_chooses_from(tmp_path):
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps({"extends": "w4a6", "budget": {"ratio": 0.4, "widths": [4, 8, 16]}}))
    rows = json.loads(invoke("inspect", "tiny", "--recipe", str(file), "--json"))
    assert {row["bits"] for row in rows} == {"-", "W4|8|16A6"}


def test_sensitivity_prints_shares_that_sum_to_one(small):
    data = json.loads(invoke("sensitivity", *small, "--videos", "2", "--recipe", "w4a8", "--quiet", "--json"))
    assert len(data["alpha"]) == 2
    assert sum(data["alpha"]) == pytest.approx(1)


def test_generate_writes_the_asked_video_from_model_and_bundle(bundle, tmp_path):
    prompt = "ring red right slow black row1 column2"
    # Floats are taken or not by what is measured: the video shows that it runs.
    for name, extra in (("a.gif", ()), ("b.webp", ("--bundle", bundle, "--floats-where-faster"))):
        data = json.loads(invoke("generate", "--out", str(tmp_path / name), "--prompt", prompt, "--json", *extra))
        assert data["prompt"] == prompt
        assert (tmp_path / name).stat().st_size > 100


def test_a_video_takes_floats_where_they_are_faster_when_asked_and_says_so(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(float_where_faster, "_measured", lambda *given: (0.002, 0.001))
    words = ["generate", "--out", str(tmp_path / "v.gif"), "--bundle", bundle, "--chunks", "1", "--floats-where-faster"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "layers in floats, faster so on this CPU: 42, which take" in done.stderr


@pytest.mark.parametrize(
    ("out", "extra", "asked"),
    [
        ("v.gif", (), False),
        ("v.gif", ("--report", "r.html"), False),
        ("l.safetensors", (), False),
        ("l.safetensors", ("--floats-where-faster",), True),
    ],
)
def test_a_bundle_is_computed_alike_everywhere_unless_asked(out, extra, asked, tmp_path, monkeypatch):
    class AskedError(ValueError):
        pass

    def optimize(module, *, floats_where_faster):
        raise AskedError(floats_where_faster)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fxq.cli.generate._running", lambda *given: object())
    monkeypatch.setattr("fxq.cli.generate.optimize", optimize)
    with pytest.raises(AskedError, match=f"^{asked}$"):
        invoke("generate", "--out", out, "--bundle", "b", *extra)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "--out", "x", "--recipe", "w8a9"), "did you mean 'w8a8'"),
        (("quantize", "--out", "x", "--model", "nope"), "unknown model 'nope'"),
        (("quantize", "--out", "x", "--model", "no_such_module:f"), "No module named 'no_such_module'"),
        (("quantize", "--out", "x", "--bits-per-weight", "5", "--budget", "0.3"), "got bits_per_weight, ratio"),
        (("quantize", "--out", "x", "--save-recipe", "x.json"), "--save-recipe x.json: a recipe file ends in .toml"),
        (("inspect", "nothing-here"), "unknown model 'nothing-here'"),
        (("generate", "--out", "x.avi"), ".gif, .webp, .png, .mp4"),
        (("generate", "--out", "x.gif", "--prompt", "rign red right slow black row1 column2"), "did you mean 'ring'"),
    ],
)
def test_a_refusal_is_one_clear_line_and_exit_code_one(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fxq", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capfd.readouterr().err
    assert ended.value.code == 1
    assert message in told
    assert "Traceback" not in told
    assert not any(tmp_path.iterdir())


def test_a_refusal_of_the_command_is_no_traceback_either(tmp_path):
    words = [sys.executable, "-m", "fxq", "quantize", "--out", "x", "--recipe", "w8a9"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 1 and "did you mean 'w8a8'" in result.stderr and "Traceback" not in result.stderr


def test_wrong_usage_is_exit_code_two():
    assert run("quantize").returncode == 2


def test_a_damaged_bundle_is_refused_by_inspect(bundle, tmp_path):
    module = fxq.load(bundle)
    fxq.save(module, tmp_path / "b")
    (tmp_path / "b" / "graph.json").write_text("{}")
    result = run("inspect", str(tmp_path / "b"))
    assert result.returncode == 1
    assert "truncated or altered" in result.stderr


@pytest.mark.sweep
def test_same_seed_same_video(bundle):
    first, second = (
        generated(tiny_rollout(load_tiny(), 1, seed=3, unseen=True)[0], fxq.load(bundle)) for _ in range(2)
    )
    assert torch.equal(first, second)
