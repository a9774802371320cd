import dataclasses
import pathlib

import pytest
import torch
from torch import nn

import fxq
from benchmarks.live_bytes import LiveBytes
from fxq.calibration.calibrate import observed
from fxq.calibration.collect import CalibrationError, Collector
from fxq.calibration.observers import _Seen
from fxq.capture.trace import trace
from fxq.core.ir import get_tensor
from fxq.core.rows import Weighting
from fxq.job import Job
from fxq.passes.methods.ranges import RangeSearch
from fxq.runtime.memory.residency import Residency, mapped_tensor
from fxq.runtime.progress import Progress
from tests.toys import Toy, recipe, rows, toy, wan_rollout


def planned(model, x, chosen=None):
    graph = trace(model, (x,), None, None)
    Job(chosen or recipe(), Progress(False)).plan(graph)
    return graph


def collected(graph, calls, leaders=None, folder=None):
    collector = Collector(1000, 10_000, 3, leaders or {}, folder)
    run = observed(graph.module, collector, gradients=True)
    with torch.no_grad():
        results = []
        for collector.batch, x in enumerate(calls):
            results.append(run(x))
    return collector.finish(), results


def test_outputs_are_those_of_the_model_and_carry_no_gradient():
    model, x = toy(), rows(5, 96)
    _, (result,) = collected(planned(model, x), [x])
    assert torch.equal(result, model(x)) and not result.requires_grad


def test_the_squared_gradient_is_that_of_a_random_probe():
    """In the mean over calls the squared gradient is the squared norm of the Jacobian, over the layer's outputs."""
    model = toy(blocks=2)
    x = rows(6, 96)
    graph = planned(model, x)
    statistics, _ = collected(graph, [x] * 300)
    for layer, block in (("blocks.0.up", 0), ("blocks.1.down", 1)):
        module = model.get_submodule(layer)
        want = []
        for row in x:
            value = row
            for i, other in enumerate(model.blocks):
                if i == block:
                    break
                value = other(value)
            want.append(_jacobian(model, module, row) / module.out_features)
        got = statistics[layer].gradients.unflatten(0, (300, 6)).mean(0)
        torch.testing.assert_close(got / got.sum(), torch.stack(want) / sum(want), atol=0.03, rtol=0.15)
        assert float(got.mean()) == pytest.approx(float(torch.stack(want).mean()), rel=0.15)


def _jacobian(model, module, row):
    """Squared Frobenius norm of the derivative of the model's output by an addition to the module's output."""

    def run(delta):
        handle = module.register_forward_hook(lambda m, a, out: out + delta)
        try:
            return model(row)
        finally:
            handle.remove()

    return torch.autograd.functional.jacobian(run, torch.zeros(module.out_features)).square().sum()


class Ending(nn.Module):
    """Its first row is thrown away at the end."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Toy(), nn.Linear(7, 7)

    def forward(self, x):
        return self.body(x)[1:]


def test_rows_that_nothing_reads_have_no_gradient():
    x = rows(6, 96)
    statistics, _ = collected(planned(Ending().eval(), x), [x, x])
    gradients = statistics["body.blocks.0.up"].gradients.unflatten(0, (2, 6))
    assert not gradients[:, 0].any() and bool((gradients[:, 1:] > 0).all())


def test_layers_of_one_input_share_the_mean_of_their_gradients():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(96, 96), nn.Linear(96, 96)

        def forward(self, x):
            return 3 * self.a(x) + self.b(x)

    model, x = Two().eval(), rows(4, 96)
    chosen = fxq.Recipe(name="plain", rules=(fxq.Rule("*", fxq.Scheme()),), methods=(RangeSearch(),))
    apart, _ = collected(planned(model, x, chosen), [x])
    joint, _ = collected(planned(model, x, chosen), [x], {"b": "a"})
    torch.testing.assert_close(joint["a"].gradients, (apart["a"].gradients + apart["b"].gradients) / 2)
    assert joint["b"] is joint["a"]


def test_of_a_rollout_the_predictions_count():
    rollout = wan_rollout()
    graph = trace(rollout.denoiser, *(lambda e: (e[0], None, e[1]))(rollout.example_call()))
    job = Job(dataclasses.replace(recipe(), weighting="gradient"), Progress(False))
    job.plan(graph)
    job.calibrate(graph, rollout)
    statistics = graph.statistics["blocks.0.ffn.0"]
    assert len(statistics.gradients) == len(statistics.rows) and bool((statistics.gradients >= 0).all())
    share = float((statistics.gradients == 0).float().mean())
    assert 0.2 < share < 0.5  # one call of three is a context call
    again = trace(rollout.denoiser, *(lambda e: (e[0], None, e[1]))(rollout.example_call()))
    job.plan(again)
    job.calibrate(again, rollout)
    assert torch.equal(again.statistics["blocks.0.ffn.0"].gradients, statistics.gradients)


def test_with_a_folder_the_numbers_are_the_same_and_no_file_stays(tmp_path):
    model, x = toy(width=512, hidden=512), rows(600, 512)
    graph = planned(model, x)
    with_folder, _ = collected(graph, [x], folder=tmp_path)
    without, _ = collected(graph, [x])
    for layer in without:
        assert torch.equal(with_folder[layer].gradients, without[layer].gradients)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not pathlib.Path("/proc/self/pagemap").exists(), reason="pages are given back on Linux")
def test_mapped_weights_leave_memory_in_the_backward_pass_too(tmp_path, monkeypatch):
    model, x = toy(width=512, hidden=512, blocks=3).requires_grad_(False), rows(8, 512)
    layers = [layer for block in model.blocks for layer in (block.up, block.down)]
    for number, layer in enumerate(layers):
        weight = mapped_tensor(tmp_path / str(number), (512, 512), torch.float32).copy_(layer.weight)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    graph, residency = planned(model, x), Residency()
    weights = [get_tensor(graph.module, f"blocks.{i}.{name}.weight") for i in range(3) for name in ("up", "down")]
    residency.give_back(*weights)
    alive = []
    told = _Seen.tell

    def tell(seen, gradient):
        alive.append(residency.give_back(*weights))
        told(seen, gradient)

    monkeypatch.setattr(_Seen, "tell", tell)
    collected(graph, [x])
    assert len(alive) == 6 and max(alive) <= weights[0].nbytes
    assert residency.give_back(*weights) == 0


class InMemory(LiveBytes):
    """Does not count what lies in files."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.from_file.default:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_with_a_folder_a_deeper_model_needs_no_more_memory(tmp_path):
    peaks = []
    for blocks in (2, 8):
        model, x = toy(width=256, hidden=256, blocks=blocks), rows(1100, 256)  # above what is worth a file
        graph = planned(model, x)
        with InMemory() as live:
            collected(graph, [x], folder=tmp_path)
        peaks.append(live.peak)
    assert peaks[1] < peaks[0] + x.nbytes


@torch.library.custom_op("fxq_tests::no_gradient", mutates_args=())
def no_gradient(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@no_gradient.register_fake
def _(x):
    return torch.empty_like(x)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(96, 96), nn.Linear(96, 96)

    def forward(self, x):
        return self.b(no_gradient(self.a(x)))


def test_an_operator_without_a_gradient_is_an_error_with_a_way_out():
    model, x = Opaque().eval(), rows(4, 96)
    chosen = fxq.Recipe(name="plain", rules=(fxq.Rule("*", fxq.Scheme()),), methods=(RangeSearch(),))
    with pytest.raises(CalibrationError, match=r"weighting = 'gradient'.*no_gradient.*'uniform'"):
        collected(planned(model, x, chosen), [x])


def test_gradients_weigh_rows_and_only_where_they_are_asked_for():
    model, x = toy(), rows(64, 96)
    weighted = {}
    for weighting in (Weighting.GRADIENT, Weighting.UNIFORM):
        chosen = dataclasses.replace(recipe(4, methods=(*recipe().methods, fxq.recipes.GPTQ())), weighting=weighting)
        weighted[weighting] = fxq.quantize(model, [x], chosen, progress=False).state_dict()
    assert any(
        not torch.equal(value, weighted[Weighting.UNIFORM][name])
        for name, value in weighted[Weighting.GRADIENT].items()
    )
