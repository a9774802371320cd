import dataclasses
import math

import pytest
import torch

import fxq
from fxq.core.facts import ChosenAttentions, Facts
from fxq.core.ir import QuantGraph
from fxq.core.pipeline import run_passes
from fxq.passes import ExactWhereFaster
from fxq.passes.measured import exact_where_faster, float_where_faster
from fxq.passes.measured.exact_where_faster import AttentionSize
from tests.passes.test_quantize_attention import Attend, Two, count, inputs, quantized
from tests.toys import recipe

SAID = "1 ms exact, 2 ms in 8 bits, as measured here for 8 queries and 64 keys of 4 heads"


@pytest.fixture(autouse=True)
def linears(monkeypatch):
    """Linears are faster in integers."""
    monkeypatch.setattr(float_where_faster, "_measured", lambda *given: (0.001, 0.002))


@pytest.fixture
def times(monkeypatch):
    """Sizes that were measured; exact attention takes half the time."""
    asked = []

    def measured(size):
        asked.append(size)
        return 0.002, 0.001

    monkeypatch.setattr(exact_where_faster, "_measured", measured)
    return asked


def test_an_attention_that_loses_becomes_exact_and_says_why(times):
    module = quantized(max_error=0.05)
    fast, plain = fxq.optimize(module, floats_where_faster=True), fxq.optimize(module)
    assert times == [AttentionSize(8, 64, 2, 4, 16, torch.float32, "cpu")]
    assert count(plain, "fxq.attention_int8") == 1 and count(fast, "fxq.attention_int8") == 0
    assert count(fast, "fxq.attention") == 2, "the pieces of the cache stay apart"
    near, far = ChosenAttentions.of(Facts.of(fast).others).layers
    assert near.reason == SAID and near.error is not None and "more than 5.00%" in far.reason
    text = str(fxq.summary(fast))
    assert "int8 attention: 0 of 2" in text and f"exact attention: near.o: {SAID}" in " ".join(text.split())
    assert not ChosenAttentions.of(Facts.of(module).others).layers[0].reason, "the module itself is as it was"
    exact = quantized(keep=("*",))
    got, want = (made(*inputs()) for made in (fast, fxq.optimize(exact, floats_where_faster=True)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_an_attention_that_wins_stays_and_tells_both_times(times, monkeypatch):
    monkeypatch.setattr(exact_where_faster, "_measured", lambda size: (0.001, 0.001))
    module = quantized(max_error=0.05)
    fast = fxq.optimize(module, floats_where_faster=True)
    assert count(fast, "fxq.attention_int8") == 1
    told = next(row.remarks for row in fxq.summary(fast).rows if row.layer == "near.o")
    assert any(text.startswith("attention in 8 bits: 1 ms exact, 1 ms in 8 bits, as measured here") for text in told)


def test_each_of_several_has_its_own_reason(monkeypatch):
    found = iter([(0.001, 0.002), (0.002, 0.001)])
    monkeypatch.setattr(exact_where_faster, "_measured", lambda size: next(found))
    model = Two(Attend(), Attend())
    model.gain.fill_(1.0)
    module = quantized(model, max_error=0.5)
    assert count(module, "fxq.attention_int8") == 2
    fast = fxq.optimize(module, floats_where_faster=True)
    assert [bool(layer.reason) for layer in ChosenAttentions.of(Facts.of(fast).others).layers] == [False, True]


def test_of_attentions_that_are_not_those_of_the_recipe_a_note_tells(times):
    graph = QuantGraph.of(quantized(max_error=0.05)).fork()
    facts = Facts.of(graph.module)
    dataclasses.replace(facts, others={}).attach(graph.module)
    run_passes(graph, (ExactWhereFaster(),))
    assert graph.remarks["near.o"] == [f"exact attention: {SAID}"] and not graph.found


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("no memory\nat all"), "attention in 8 bits: could not be measured (no memory)"),
        (ValueError("size u0 depends on data"), exact_where_faster._UNKNOWN),
    ],
)
def test_what_cannot_be_measured_stays_and_says_why(error, told, monkeypatch):
    def fails(*given):
        raise error

    name = "_size" if isinstance(error, ValueError) else "_measured"
    module = quantized(max_error=0.05)
    monkeypatch.setattr(exact_where_faster, name, fails)
    fast = fxq.optimize(module, floats_where_faster=True)
    assert count(fast, "fxq.attention_int8") == 1
    assert told in next(row.remarks for row in fxq.summary(fast).rows if row.layer == "near.o")


def test_without_attentions_in_8_bits_nothing_is_measured(times):
    fxq.optimize(fxq.quantize(Attend().eval(), [inputs()], recipe(8), progress=False), floats_where_faster=True)
    assert not times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_are_measured_for_real(dtype):
    size = AttentionSize(8, 33, 2, 3, 16, dtype, "cpu")
    others = [{"pieces": 1}, {"keys": 1}, {"scheme": "int8_fp8"}]
    for case in (size, *(dataclasses.replace(size, **other) for other in others)):
        assert all(0 < seconds < math.inf for seconds in exact_where_faster.attention_seconds(case))
