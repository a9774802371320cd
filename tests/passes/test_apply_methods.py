import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxq
from benchmarks.live_bytes import LiveBytes
from fxq.capture.trace import trace
from fxq.core.ir import LayerPlan, Stage
from fxq.core.method import LayerStatistics
from fxq.core.pipeline import run_passes
from fxq.core.rows import Weighting
from fxq.job import Job
from fxq.passes import ApplyMethods, apply_methods
from fxq.passes.apply_methods import group_order
from fxq.passes.methods import LayerProblem
from fxq.passes.methods.ranges import MinMax, RangeSearch
from fxq.presets import LEAST_ERROR
from fxq.runtime.checkpoint import Checkpoint
from fxq.runtime.progress import Progress
from tests.core.test_verify import at
from tests.toys import LEARN, QUICK, recipe, rows, toy


@dataclasses.dataclass(frozen=True)
class Counting:
    """MinMax that remembers the problems it saw."""

    tag: int = 0
    seen: list[LayerProblem] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def apply(self, problem, update):
        self.seen.append(problem)
        return MinMax().apply(problem, update)

    def __deepcopy__(self, memo):
        return self


def solved(directory=None, method=None, **options):
    graph = at(Stage.CALIBRATED)
    graph.updates.clear()
    method = method or Fresh()
    run_passes(
        graph, (ApplyMethods((method,), Weighting.UNIFORM, checkpoint=directory and Checkpoint(directory), **options),)
    )
    return graph, CALLS.pop("count", 0)


CALLS: dict[str, int] = {}


@dataclasses.dataclass(frozen=True)
class Fresh:
    """MinMax that counts its calls."""

    tag: int = 0

    def apply(self, problem, update):
        CALLS["count"] = CALLS.get("count", 0) + 1
        return MinMax().apply(problem, update)


def equal(a, b):
    def same(x, y):
        return x is y if x is None or y is None else torch.equal(x, y)

    return a.updates.keys() == b.updates.keys() and all(
        same(getattr(a.updates[layer], f.name), getattr(b.updates[layer], f.name))
        for layer in a.updates
        for f in dataclasses.fields(a.updates[layer])
    )


@given(width=st.integers(1, 80), data=st.data())
def test_the_group_order_is_a_permutation_with_outliers_last(width, data):
    outliers = sorted(data.draw(st.sets(st.integers(0, width - 1), max_size=width // 2)))
    plan = LayerPlan(layer="x", in_features=width, out_features=1, outliers=tuple(outliers))
    order = group_order(plan)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(width))
    assert order[plan.split :].tolist() == outliers
    assert order[: plan.split].tolist() == sorted(set(range(width)) - set(outliers))
    inverse = order.argsort()
    assert torch.equal(torch.arange(width)[order][inverse], torch.arange(width))


def test_a_rerun_reads_every_finished_layer(tmp_path):
    first, calls = solved(tmp_path)
    again, repeated = solved(tmp_path)
    assert (calls, repeated) == (2, 0) and equal(first, again)
    assert first.plans == again.plans


def test_a_killed_run_resumes_at_the_layer_it_was_at(tmp_path):
    first, _ = solved(tmp_path)
    (tmp_path / "blocks.0.down.safetensors").unlink()
    again, calls = solved(tmp_path)
    assert calls == 1 and equal(first, again)


@pytest.mark.parametrize("damage", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", None])
def test_a_damaged_checkpoint_is_worked_out_again(tmp_path, damage):
    first, _ = solved(tmp_path)
    file = tmp_path / "blocks.0.up.safetensors"
    damage = file.read_bytes()[:-7] if damage is None else damage
    file.unlink()  # the first run's integers are mapped from it
    file.write_bytes(damage)
    again, calls = solved(tmp_path)
    assert calls == 1 and equal(first, again)
    assert solved(tmp_path)[1] == 0


def test_other_settings_are_worked_out_again(tmp_path):
    solved(tmp_path)
    assert solved(tmp_path, Fresh(tag=1))[1] == 2
    assert solved(tmp_path, Fresh(tag=1), seed=4)[1] == 2
    assert solved(tmp_path, Fresh(tag=1), seed=4)[1] == 0


def test_progress_counts_layers():
    told = []
    solved(on_layer=lambda *args: told.append(args))
    assert told == [("blocks.0.up", 0, 2), ("blocks.0.down", 1, 2), ("", 2, 2)]


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [("sensitivity", ([1.5, 0.5], [1.5, 0.5])), ("single_scale_only", ([1.0, 1.0], [1.5, 0.5]))],
)
def test_rows_weigh_what_their_chunk_weighs(weighting, weights):
    graph = at(Stage.CALIBRATED)
    graph.chunk_weights = torch.tensor([1.5, 0.5])
    for statistics in graph.statistics.values():
        statistics.chunks = torch.arange(len(statistics.rows)) % 3
    method = Counting()
    run_passes(graph, (ApplyMethods((method,), Weighting(weighting)),))
    for problem, (first, second) in zip(method.seen, weights, strict=True):
        assert problem.row_weights[:3].tolist() == [first, second, second]


def test_methods_see_channels_in_group_order():
    graph, method = at(Stage.CALIBRATED), Counting()
    weight = graph.module.get_parameter("blocks.0.up.weight").detach()
    run_passes(graph, (ApplyMethods((method,), Weighting.UNIFORM),))
    plan, seen = graph.plans["blocks.0.up"], method.seen[0]
    assert torch.equal(seen.weight[:, plan.split :], weight[:, list(plan.outliers)])
    assert torch.equal(seen.rows[:, plan.split :], graph.statistics["blocks.0.up"].rows[:, list(plan.outliers)])
    assert seen.groups == (slice(0, plan.split), slice(plan.split, 96))


class Two(nn.Module):
    """Two linears on one input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(96, 32), nn.Linear(96, 64)

    def forward(self, x):
        return self.a(x).sum(-1) + self.b(x).sum(-1)


def test_layers_of_one_input_have_one_copy_of_its_rows(monkeypatch):
    graph, chosen = trace(Two().eval(), (rows(50, 96),)), dataclasses.replace(recipe(), share_inputs=True)
    job = Job(chosen, Progress(False))
    job.plan(graph)
    job.calibrate(graph, [rows(50, 96)])
    copies, ordered_rows = [], apply_methods._ordered_rows
    monkeypatch.setattr(
        apply_methods, "_ordered_rows", lambda *given: copies.append(ordered_rows(*given)) or copies[-1]
    )
    method = Counting()
    ApplyMethods((method,), Weighting.UNIFORM, share_inputs=True).run(graph)
    (problem,) = method.seen
    assert len(problem.weight) == 96 and len(copies) == 1 and problem.rows is copies[0]
    assert not problem.cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiplied", [False, True])
def test_rows_are_put_in_order_without_a_second_copy(multiplied, dtype):
    x, order = rows(5000, 64).to(dtype), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    multiplier = rows(64, seed=3) if multiplied else None
    chunks = torch.zeros(5000, dtype=torch.int64)
    statistics = LayerStatistics(low=x[0], high=x[0], rows=x, chunks=chunks, seen=5000, multiplier=multiplier)
    with LiveBytes() as live:
        found = apply_methods._ordered_rows(statistics, order)
    want = x.float() if multiplier is None else x.float() * multiplier
    assert torch.equal(found, want[:, order]) and live.peak < 1.4 * found.nbytes


@pytest.mark.parametrize("weighting", ["uniform", "gradient"])
def test_sums_over_all_rows_make_of_a_small_sample_nearly_what_all_rows_make(weighting, tmp_path):
    """Error on all rows over that of methods that saw all of them; an outlier group, stacked layers."""
    data = [rows(700, 96, seed=seed) for seed in range(3)]
    whole = dataclasses.replace(recipe(4, methods=LEAST_ERROR, weighting=weighting), rows_per_call=10_000)
    few = dataclasses.replace(whole, max_rows=120)
    model = toy()

    def error(chosen, **options):
        module = fxq.quantize(model, data, chosen, progress=False, **options)
        return sum(float((module(x) - model(x)).double().square().sum()) for x in data)

    all_rows = dataclasses.replace(few, all_rows=True)
    alone, summed, known = error(few), error(all_rows), error(whole)
    assert summed < 0.9 * alone and summed < 1.15 * known, (summed / alone, summed / known)
    assert error(all_rows, checkpoint_dir=tmp_path) == summed == error(all_rows, checkpoint_dir=tmp_path)


def test_plans_get_the_measured_quality():
    graph = at(Stage.CALIBRATED)
    assert all(plan.output_sqnr > 10 for plan in graph.quantized_plans.values())
    assert graph.plans["head"].output_sqnr is None


def test_methods_follow_each_other():
    graph = at(Stage.CALIBRATED)
    run_passes(graph, (ApplyMethods((MinMax(), *QUICK), Weighting.UNIFORM),))
    alone = at(Stage.CALIBRATED)
    run_passes(alone, (ApplyMethods((RangeSearch(*QUICK[0].__dict__.values()),), Weighting.UNIFORM),))
    assert equal(graph, alone)


def test_a_recipe_without_methods_is_refused():
    with pytest.raises(ValueError, match="the recipe has no method"):
        run_passes(at(Stage.CALIBRATED), (ApplyMethods(()),))


@pytest.mark.gpu
@pytest.mark.parametrize("per_token", [False, True])
def test_methods_choose_on_a_gpu_what_they_choose_on_a_cpu(per_token):
    chosen = recipe(4, methods=LEARN, per_token=per_token)
    x = rows(40, 96)
    quantized = [fxq.quantize(toy().to(device), [x.to(device)], chosen, progress=False) for device in ("cpu", "cuda")]
    assert all(t.is_cuda for t in quantized[1].state_dict().values())
    assert all(row.output_sqnr > 10 for row in fxq.summary(quantized[1]).quantized)
    torch.testing.assert_close(quantized[1](x.cuda()).cpu(), quantized[0](x), rtol=0, atol=0.05)


@pytest.mark.parametrize(("inputs", "weights"), [(1e-30, 1e-20), (1e30, 1e10)])
@pytest.mark.parametrize("name", ["w8a8", "w8a8-dynamic"])
def test_a_float64_layer_whose_outputs_float32_does_not_hold_is_refused_by_name(name, inputs, weights):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.mul_(weights)
    x = rows(16, 64).double() * inputs
    with pytest.raises(fxq.CalibrationError, match=r"layer 0: products of its inputs .* leave the range of float32"):
        fxq.quantize(model, [x], name, progress=False)
    q = fxq.quantize(model, [x / inputs * (1e-10 / weights)], name, progress=False)
    assert fxq.summary(q).rows[0].output_sqnr > 30
    with torch.no_grad():
        model[0].weight.zero_()
    assert fxq.summary(fxq.quantize(model, [x], name, progress=False)).rows[0].quantized
