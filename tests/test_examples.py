import pathlib
import runpy
import subprocess
import sys

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["quantize_module.py", "own_rollout.py"])
def test_the_example_runs(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    text = capsys.readouterr().out
    assert "linears quantized" in text
    error = next(line for line in text.splitlines() if "error" in line)
    assert float(error.split()[-1]) < 0.2


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["compile_backend.py", "diffusers_wan.py"])
def test_the_compiled_example_runs(name, capsys):
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers")
    torch._dynamo.reset()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    text = capsys.readouterr().out
    assert "linears quantized" in text
    error = next(line for line in text.splitlines() if "relative error" in line)
    assert float(error.split()[-1]) < 0.02


@pytest.mark.slow
def test_the_folder_example_writes_what_diffusers_reads(capsys):
    pytest.importorskip("diffusers")
    example = runpy.run_path(str(EXAMPLES / "diffusers_folder.py"), run_name="fxq_example")
    example["main"]([])
    text = capsys.readouterr().out
    error = next(line for line in text.splitlines() if "relative error" in line)
    assert float(error.split()[-1]) < 0.02
    assert "from_pretrained differs from it by 0.00000" in text or "needs accelerate" in text


@pytest.mark.sweep
def test_the_example_on_two_ranks_makes_the_video_of_one():
    script = [sys.executable, str(EXAMPLES / "tensor_parallel.py")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    errors = [float(line.split()[-1]) for line in done.stdout.splitlines() if "relative error" in line]
    assert len(errors) == 2 and max(errors) < 0.01


@pytest.mark.sweep
def test_training_runs_saves_and_resumes(tmp_path):
    script = [sys.executable, str(EXAMPLES / "tiny_arvd" / "train.py"), "--out", str(tmp_path), "--threads", "1"]
    for stages in (["1:2:2"], ["1:2:2", "2:2:2"]):
        done = subprocess.run([*script, "--eager", "--stages", *stages], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
    assert "'done': 4" in done.stdout
    assert "'done': 2" not in done.stdout
    assert (tmp_path / "tiny.safetensors").stat().st_size > 1_000_000


def test_the_scorer_script_reports_real_and_shuffled_clips(capsys):
    runpy.run_path(str(EXAMPLES / "tiny_arvd" / "score.py"), run_name="fxq_example")["main"](
        ["--videos", "16", "--no-model"]
    )
    text = capsys.readouterr().out
    assert "real clips" in text
    assert "shuffled prompts" in text
