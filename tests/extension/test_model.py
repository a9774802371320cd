"""A model from outside the package: an adapter that the command line knows by name."""

import json

import pytest
import torch
from typer.testing import CliRunner

import fxq
from fxq.cli import app
from fxq.cli.options.models import AdapterError, ModelFiles, make_rollout

SOURCE = '''
"""A model that continues a signal chunk by chunk."""

import dataclasses

import torch
from torch import nn
from torch.export import Dim

import fxq


class Denoiser(nn.Module):
    """(noisy chunk [B, F, W], chunk before it [B, F, W]) -> clean chunk."""

    def __init__(self, width):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x, past):
        for block in self.blocks:
            x = x + torch.tanh(block(x + past))
        return x


@dataclasses.dataclass(frozen=True)
class State(fxq.State):
    past: torch.Tensor


class Robot(fxq.Rollout):
    """Two steps a chunk of two frames."""

    def units(self, condition, draws):
        return draws.shape[0] // 2

    def begin(self, condition, draws):
        start = condition["start"]
        return State(condition, draws, 0, start[:, :0], start)

    def advance(self, state, on_call=None):
        unit, x = state.next_unit, state.draws.noise[:, 2 * state.next_unit : 2 * state.next_unit + 2, 0, 0]
        for step in range(2):
            span = fxq.Span(unit, step, (2 * unit, 2 * unit + 2), 1.0 - step / 2)
            x = self.call(fxq.Call(2 * unit + step, "denoise", (span,), 1), x, state.past, on_call=on_call)
        return State(state.condition, state.draws, unit + 1, torch.cat((state.latents, x), 1), x)

    def example_call(self):
        width = self.denoiser.blocks[0].in_features
        return (torch.randn(2, 2, width), torch.randn(2, 2, width)), ({0: Dim.AUTO}, {0: Dim.AUTO})


def rollout(videos, seed, files):
    torch.manual_seed(7)
    width = files.settings.get("width", 64)
    draws = fxq.Draws(range(seed, seed + videos), (files.frames or 6, 1, 1, width))
    return Robot(Denoiser(width).eval(), [({"start": torch.zeros(videos, 2, width)}, draws)])
'''


@pytest.fixture
def installed(outside):
    outside.install("robot_for_fxq", SOURCE, models={"robot": "rollout"})


def invoke(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def test_the_command_line_quantizes_it_by_name(installed, tmp_path):
    out, options = tmp_path / "bundle", ("--model", "robot", "--videos", 3, "--seed", 2, "--quiet", "--json")
    told = invoke("quantize", "--out", out, "--recipe", "w8a8", "--iterations", 2, *options)
    assert told["quantized"] >= 1 and told["facts"]["recipe"]["name"] == "w8a8"
    rollout = make_rollout("robot", 3, 2)
    want, bundle = rollout.rollout(*rollout.batches[0]), fxq.load(out)
    with rollout.using(bundle):
        got = rollout.rollout(*rollout.batches[0])
    assert 0 < float((got - want).norm() / want.norm()) < 0.02
    alpha = torch.tensor(invoke("sensitivity", "--recipe", "w8a8", *options)["alpha"])
    assert alpha.shape == (3,) and float(alpha.sum()) == pytest.approx(1)


def test_it_gets_the_files_and_settings_of_the_command_line(installed):
    rollout = make_rollout("robot", 2, 0, ModelFiles(frames=10, settings={"width": 32}))
    assert rollout.denoiser.blocks[0].in_features == 32 and rollout.units(*rollout.batches[0]) == 5
    layers = invoke("inspect", "robot", "--set", "width=96", "--json")
    assert [row["shape"] for row in layers] == [[96, 96], [96, 96]]


def test_what_returns_no_rollout_is_refused(outside):
    outside.install("no_rollout", "def make(videos, seed, files):\n    return 5\n", models={"robot": "make"})
    with pytest.raises(AdapterError, match=r"model 'robot' returned int, expected a fxq\.Rollout"):
        make_rollout("robot", 1, 0)
    with pytest.raises(AdapterError, match=r"unknown model 'robott': expected 'tiny', one of .*, robot, or"):
        make_rollout("robott", 1, 0)
