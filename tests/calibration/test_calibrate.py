import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxq
from fxq.calibration.calibrate import Batch, as_batch, calibrate, usable
from fxq.calibration.collect import CalibrationError, Collector
from fxq.capture.trace import trace
from fxq.core.pipeline import run_passes
from fxq.passes import PlanLayers
from tests.toys import recipe, rows, toy


class Keywords(nn.Module):
    """Takes a nested dict and an optional keyword."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Linear(48, 32)

    def forward(self, inputs, *, gain=None):
        y = self.first(inputs["a"]) + self.second(inputs["b"])
        return {"y": y if gain is None else y * gain}


class Apart(nn.Module):
    """Two linears on inputs of different lengths."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Linear(48, 32)

    def forward(self, a, b):
        return self.first(a), self.second(b)


def planned_graph(model, args, kwargs=None, dynamic_shapes=None):
    graph = trace(model.eval(), args, kwargs, dynamic_shapes)
    return run_passes(graph, (PlanLayers(recipe()),))


def collected(graph, loader, **options):
    collector = Collector(**{"rows_per_call": 100, "max_rows": 1000, "seed": 0, **options})
    calibrate(graph, loader, None, collector)
    return graph.statistics


@pytest.mark.parametrize(
    ("item", "args", "kwargs"),
    [
        ((1, 2), (1, 2), {}),
        ([1], (1,), {}),
        ({"x": 1}, (), {"x": 1}),
        (Batch((1,), {"y": 2}, chunk=3), (1,), {"y": 2}),
    ],
)
def test_items_are_read_by_their_kind(item, args, kwargs):
    batch = as_batch(item)
    assert (batch.args, dict(batch.kwargs)) == (args, kwargs)


@pytest.mark.parametrize("item", ["text", 3, None, {1, 2}])
def test_other_items_are_refused(item):
    with pytest.raises(CalibrationError, match=f"yielded {type(item).__name__}; expected a dict"):
        as_batch(item)


@given(calls=st.lists(st.integers(0, 40), min_size=1, max_size=8), per_call=st.integers(1, 20), most=st.integers(1, 30))
def test_the_collector_has_exact_extremes_and_a_bounded_sample(calls, per_call, most):
    collector = Collector(per_call, most, 0)
    everything = []
    for chunk, count in enumerate(calls):
        collector.chunk = chunk
        x = torch.arange(count * 3, dtype=torch.float32).reshape(count, 3) + 1000 * chunk
        everything.append(x)
        collector.add("layer", x)
    statistics = collector.finish()
    seen = torch.cat(everything)
    if not len(seen):
        assert not statistics
        return
    s = statistics["layer"]
    assert torch.equal(s.low, seen.amin(0)) and torch.equal(s.high, seen.amax(0)) and s.seen == len(seen)
    assert 1 <= len(s.rows) <= most and len(s.rows) == len(s.chunks)
    assert torch.equal((s.rows[:, 0] // 1000).long(), s.chunks)
    assert {tuple(r) for r in s.rows.tolist()} <= {tuple(r) for r in seen.tolist()}


def test_statistics_are_of_the_input_of_the_right_layer():
    model = toy()
    graph = planned_graph(model, (rows(4, 96),))
    data = [rows(4, 96, seed=s) for s in (5, 6)]
    statistics = collected(graph, data)
    x = torch.cat(data)
    assert torch.equal(statistics["blocks.0.up"].low, x.amin(0)) and torch.equal(statistics["blocks.0.up"].rows, x)
    hidden = torch.nn.functional.gelu(model.blocks[0].up(x))
    torch.testing.assert_close(statistics["blocks.0.down"].high, hidden.amax(0))
    assert "head" not in statistics


def test_nested_arguments_are_matched_by_key_and_not_by_order():
    a, b = rows(3, 64), rows(3, 48)
    graph = planned_graph(Keywords(), ({"a": a, "b": b},))
    statistics = collected(graph, [({"b": b * 5, "a": a * 3},)])
    assert torch.equal(statistics["first"].rows, a * 3) and torch.equal(statistics["second"].rows, b * 5)


def test_keywords_and_positions_are_the_same_call():
    inputs = {"a": rows(3, 64), "b": rows(3, 48)}
    graph = planned_graph(Keywords(), (inputs,), {"gain": torch.ones(1)})
    for item in (Batch((inputs,), {"gain": torch.ones(1)}), {"gain": torch.ones(1), "inputs": inputs}):
        assert collected(graph, [item])["first"].seen == 3


A, B = rows(3, 64), rows(3, 48)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"inputs": {"a": A, "b": B}}, r"missing \['gain'\], unknown \[\]"),
        ({"inputs": {"a": A, "b": B}, "gain": A, "mask": 1}, r"missing \[\], unknown \['mask'\]"),
        (({"a": A, "b": B}, A, A), r"3 positional, missing \[\], unknown"),
        (Batch(({"a": A, "b": B},), {"inputs": 1, "gain": A}), r"unknown \['inputs'\]"),
        (Batch(({"a": A},), {"gain": A}), "nested in another way than the example"),
        (Batch(({"a": A, "b": [B, B]},), {"gain": A}), "nested in another way than the example"),
        (Batch(({"a": A[:, :5], "b": B},), {"gain": A}), "batch 1 does not fit the captured model"),
        (Batch(({"a": A, "b": None},), {"gain": A}), "batch 1 does not fit the captured model"),
    ],
)
def test_arguments_that_do_not_fit_are_named(item, message):
    good = Batch(({"a": A, "b": B},), {"gain": torch.ones(1)})
    graph = planned_graph(Keywords(), good.args, good.kwargs)
    with pytest.raises(CalibrationError, match=message):
        collected(graph, [good, item])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_refused_by_layer(value):
    x = rows(4, 96)
    graph = planned_graph(toy(), (x,))
    bad = x.clone()
    bad[2, 5] = value
    with pytest.raises(CalibrationError, match=r"layer blocks.0.up: its input has NaN or infinity in batch 3; check"):
        collected(graph, [x, x, x, bad, x])


def test_an_empty_loader_is_refused():
    with pytest.raises(CalibrationError, match="yielded no batch"):
        collected(planned_graph(toy(), (rows(4, 96),)), [])


def test_a_layer_without_rows_is_refused_by_name():
    graph = planned_graph(Apart(), (A, B), dynamic_shapes=({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO}))
    with pytest.raises(CalibrationError, match=r"1 planned layer\(s\) received no calibration row: second"):
        collected(graph, [(A, B[:0])])


def test_a_forward_loop_that_calls_nothing_is_refused():
    graph = planned_graph(toy(), (rows(4, 96),))
    with pytest.raises(CalibrationError, match=r"received no calibration row: blocks.0.up, blocks.0.down"):
        calibrate(graph, None, lambda run: None, Collector(1, 1, 0))


def test_chunks_of_batches_reach_the_rows():
    x = rows(4, 96)
    statistics = collected(planned_graph(toy(), (x,)), [Batch((x,), chunk=c) for c in (0, 2)])
    assert statistics["blocks.0.up"].chunks.tolist() == [0] * 4 + [2] * 4


def test_the_hash_names_the_data():
    graph = planned_graph(toy(), (rows(4, 96),))
    digests = [calibrate(graph, [rows(4, 96, seed=s)], None, Collector(9, 9, 0)) for s in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2] and len(digests[0]) == 64


@pytest.mark.parametrize("how", ["leaf", "result", "inference"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_tensors_of_any_mode_are_data(how, mode):
    x = rows(4, 96)
    if how == "inference":
        with torch.inference_mode():
            item = x * 1
    else:
        item = x.clone().requires_grad_() * (1 if how == "result" else 1.0)
        item = item if how == "result" else x.clone().requires_grad_()
    want = fxq.quantize(toy(), [x, x], recipe(), progress=False)
    with mode():
        got = fxq.quantize(toy(), [item, item], recipe(), progress=False)
        graph = planned_graph(toy(), (usable(item, 0).args[0],))
        assert not collected(graph, [item])["blocks.0.up"].rows.requires_grad
    assert torch.equal(got(x), want(x))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((A.numpy(),), "calibration batch 1 has numpy arrays; make tensors of them by torch.from_numpy"),
        ({"x": A.numpy()}, "calibration batch 1 has numpy arrays"),
        (A.numpy(), "yielded ndarray; expected a dict"),
        (A.tolist(), "calibration batch 1 is 192 numbers without a tensor"),
        ([0.5, 0.25], "calibration batch 1 is 2 numbers without a tensor"),
    ],
)
def test_what_is_no_tensor_is_refused_with_the_batch(item, message):
    graph = planned_graph(toy(width=64), (A,))
    with pytest.raises(CalibrationError, match=message):
        collected(graph, [A, item])


def test_a_generator_that_was_used_up_is_told_as_such():
    batches = (x for x in [rows(4, 96)])
    assert collected(planned_graph(toy(), (rows(4, 96),)), batches)
    with pytest.raises(CalibrationError, match="A generator yields its batches once"):
        collected(planned_graph(toy(), (rows(4, 96),)), batches)


def test_batch_is_public():
    assert fxq.Batch is Batch
