"""The four walks of CONTRIBUTING.md, each taken as it is written."""

import pathlib
import re
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import fxq
from fxq.cli import app
from tests.extension.outside import Outside

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def code(part):
    return "\n".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL))


BEFORE, *WALKS = TEXT.partition("## Four walks\n")[2].split("\n### Your first ")
WALKS = {walk.partition("\n")[0]: walk for walk in WALKS}


def test_there_are_four():
    assert list(WALKS) == ["pass", "method", "adapter", "export target"]


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_runs_as_it_is_written(name, monkeypatch):
    module = types.ModuleType("walk")
    monkeypatch.setitem(sys.modules, "walk", module)
    exec(compile(code(BEFORE) + "\n" + code(WALKS[name]), f"CONTRIBUTING.md: {name}", "exec"), module.__dict__)


def test_the_target_of_the_walk_is_written_from_the_command_line(tmp_path, monkeypatch):
    (group, target), (called, place) = (
        re.findall(r'^\[project.entry-points."fxq\.(\w+)"\]\n(\w+)', TEXT, re.M)[0],
        (re.search(r'= "(\w+):(\w+)"', TEXT).groups()),
    )
    outside = Outside(tmp_path, monkeypatch)
    outside.install(called, code(WALKS["export target"]), **{group: {target: place}})
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.GELU(), torch.nn.Linear(128, 33)).eval()
    quantized = fxq.quantize(model, [torch.randn(50, 96)], "w8a8-dynamic", progress=False)
    bundle, out = fxq.save(quantized, tmp_path / "bundle"), tmp_path / "plain"
    done = CliRunner().invoke(app, ["export", str(bundle), "--target", target, "--out", str(out), "--json"])
    outside.forget()
    assert done.exit_code == 0, done.output
    tensors = load_file(out / "model.safetensors")
    model.load_state_dict(tensors)
    x = torch.randn(20, 96)
    assert (model(x) - quantized(x)).norm() < 0.02 * model(x).norm()
