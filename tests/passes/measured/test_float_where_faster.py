import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fxq
from fxq.core.config import RecipeError, Scheme
from fxq.core.facts import Facts
from fxq.core.ir import Stage, planned
from fxq.core.layer import LayerTensors
from fxq.core.pipeline import PassError, run_passes
from fxq.passes import FUSIONS, FloatWhereFaster, MergeLinears
from fxq.passes.kernel_times import LinearSize
from fxq.passes.measured import float_where_faster, kept_times
from tests.passes.fusions.test_fold_permutations import Mlp
from tests.passes.fusions.test_merge_linears import frozen
from tests.toys import recipe, rows, toy, wan_rollout

LINEAR = torch.ops.aten.linear.default
X = rows(9, 96)


@pytest.fixture
def times(monkeypatch):
    """Sizes that were measured; floats take half the time of integers."""
    asked = []

    def measured(size, scheme):
        asked.append(size)
        return 0.002, 0.001

    monkeypatch.setattr(float_where_faster, "_measured", measured)
    return asked


def linears(module):
    return [node for node in module.graph.nodes if node.target == LINEAR]


def dequantized(module, layer):
    """Weight and bias of a layer, float32."""
    stored = LayerTensors.of(module, planned(module)[layer][0])
    return stored.float_weight(), stored.bias().float()


@pytest.mark.parametrize(
    ("bits", "scheme"), [(8, {}), (4, {}), (8, {"per_token": True}), (8, {"per_token": True, "asymmetric": True})]
)
def test_a_layer_gets_its_dequantized_weight_and_exact_inputs(bits, scheme, times):
    torch.manual_seed(1)
    module = fxq.quantize(torch.nn.Sequential(torch.nn.Linear(96, 40)).eval(), [X], recipe(bits, **scheme))
    before = module(X)
    fast = fxq.optimize(module, floats_where_faster=True)
    assert torch.allclose(fast(X), F.linear(X, *dequantized(module, "0")), atol=1e-5)
    assert not torch.equal(fast(X), before) and torch.equal(module(X), before)
    assert {name for name, _ in fast.named_buffers()} == {"0.weight", "0.bias"}
    (row,) = fxq.summary(fast).rows
    assert not row.quantized and row.outliers == 0 and row.output_sqnr is None
    more = 4 * 97 * 40 - sum(t.numel() * t.element_size() for t in module.buffers())
    times = "1 ms in floats, 2 ms in integers, as measured here for 8 rows"
    assert row.reason == f"{times}; {more / 1e3:.3g} kB more memory"
    (note,) = fxq.summary(fast).notes[float_where_faster.PLACE]
    assert note == f"1, which take {more / 1e3:.3g} kB more memory than their integers"


def test_outlier_channels_are_put_back_in_order(times):
    module = fxq.quantize(Mlp().eval(), [rows(2, 9, 33)], recipe(8), progress=False)
    assert "blocks.0.down.perm" in dict(module.named_buffers())
    fast = fxq.optimize(module, floats_where_faster=True)
    x = rows(3, 9, 33, seed=4)
    up, gate, down = (dequantized(module, f"blocks.0.{name}") for name in ("up", "gate", "down"))
    want = F.linear(F.gelu(F.linear(x, *up)) * F.linear(x, *gate), *down)
    assert torch.allclose(fast(x)[0], want, atol=1e-4)
    assert [(size.inputs, size.split < size.inputs, size.outputs) for size in times] == [
        (33, False, 192),
        (96, True, 17),
    ]


def test_what_integers_compute_faster_stays_as_it_is(times, monkeypatch):
    module = fxq.quantize(toy(), [X], recipe(8), progress=False)
    monkeypatch.setattr(float_where_faster, "_measured", lambda *given: (0.00097, 0.001))
    plain, measured = fxq.optimize(module), fxq.optimize(module, floats_where_faster=True)
    assert torch.equal(plain(X), measured(X)) and len(linears(measured)) == len(linears(plain)) == 1, "the head is kept"
    for row in fxq.summary(measured).quantized:
        assert row.remarks[0] == "1 ms in floats, 0.97 ms in integers, as measured here for 8 rows"
    # Within the margin floats are not worth their memory.
    monkeypatch.setattr(float_where_faster, "_measured", lambda *given: (0.001, 0.00091))
    assert len(linears(fxq.optimize(module, floats_where_faster=True))) == 1
    assert len(linears(fxq.optimize(module, (FloatWhereFaster(margin=0.0), *FUSIONS)))) == 3


def test_unasked_a_call_must_save_a_tenth_of_a_millisecond(times, monkeypatch):
    monkeypatch.delenv("FXQ_FLOATS_WHERE_FASTER", raising=False)
    module = fxq.quantize(toy(), [X], recipe(8), progress=False)
    monkeypatch.setattr(float_where_faster, "_measured", lambda *given: (0.00015, 0.00006))
    few = fxq.optimize(module)
    assert torch.equal(few(X), fxq.optimize(module, floats_where_faster=False)(X)) and len(linears(few)) == 1
    (told, *_) = fxq.summary(few).quantized[0].remarks
    times = "0.06 ms in floats, 0.15 ms in integers, as measured here for 8 rows"
    assert told == f"{times}: saves no more than 0.1 ms a call, stays quantized"
    assert len(linears(fxq.optimize(module, floats_where_faster=True))) == 3
    monkeypatch.setattr(float_where_faster, "_measured", lambda *given: (0.00025, 0.00006))
    assert len(linears(fxq.optimize(module))) == 3
    with pytest.raises(RecipeError, match="least = -1, expected seconds"):
        FloatWhereFaster(least=-1)


def test_linears_that_merge_are_measured_as_one_product(times):
    module, graph, x = frozen()
    run_passes(graph, (FloatWhereFaster(), FloatWhereFaster()))
    (size, *_) = times
    assert (size.rows, size.inputs, size.outputs) == (18, 64, sum(len(module(x)[i][0, 0]) for i in range(3)))
    assert len(linears(graph.module)) == 3 and len(times) == 1, "what is in floats is not measured again"
    for got, name in zip(graph.module(x), "qkv", strict=True):
        assert torch.allclose(got, F.linear(x, *dequantized(module, f"blocks.0.{name}")), atol=1e-4)


def test_a_layer_with_other_neighbours_elsewhere_stays(times):
    _, graph, _ = frozen("twice")
    run_passes(graph, (FloatWhereFaster(),))
    assert not times and not linears(graph.module)
    for name in "qkv":
        (told,) = graph.remarks[f"blocks.0.{name}"]
        assert told == float_where_faster._MANY_WAYS


def test_what_other_passes_have_fused_says_that_it_was_not_measured(times):
    _, graph, _ = frozen()
    run_passes(graph, (MergeLinears(), FloatWhereFaster()))
    assert not times and not linears(graph.module)
    assert all(graph.remarks[f"blocks.0.{name}"][-1] == float_where_faster._FUSED for name in "qkv")


def test_float8_stays(times):
    module = fxq.quantize(toy(), [X], "fp8", progress=False)
    fast = fxq.optimize(module, floats_where_faster=True)
    quantized = fxq.summary(fast).quantized
    assert quantized and not times
    assert all(float_where_faster._FLOAT8 in row.remarks for row in quantized)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_results_keep_their_dtype(dtype, times):
    module = fxq.quantize(toy().to(dtype), [X.to(dtype)], recipe(8), progress=False)
    fast = fxq.optimize(module, floats_where_faster=True)
    got, want = fast(X.to(dtype)), module(X.to(dtype))
    assert got.dtype == want.dtype == dtype and linears(fast)
    assert (got - want).norm() < 0.05 * want.norm()


def test_a_rollout_is_measured_for_real(monkeypatch):
    monkeypatch.setattr(kept_times, "KEPT", kept := kept_times.KeptTimes())
    monkeypatch.setattr(float_where_faster, "KEPT", kept)
    rollout = wan_rollout(seeds=(1,))
    module = fxq.quantize(rollout.denoiser, rollout, recipe(8), progress=False)
    fast = fxq.optimize(module, floats_where_faster=True)
    told = [row.reason if not row.quantized else row.remarks[0] for row in fxq.summary(fast).rows if row.bits != "-"]
    told += [row.reason for row in fxq.summary(fast).kept if "measured here" in row.reason]
    assert told and all("ms in floats" in text and "ms in integers" in text for text in told)
    args, _ = rollout.example_call()
    with torch.no_grad():
        want = rollout.denoiser(*args)[0]
        assert (fast(*args)[0] - want).norm() < 1.1 * (module(*args)[0] - want).norm()
    # A process that comes later measures nothing, and chooses the same.
    kept.forget()
    monkeypatch.setattr(float_where_faster, "kernel_seconds", None)
    assert fxq.summary(fxq.optimize(module, floats_where_faster=True)).rows == fxq.summary(fast).rows


def test_sizes_near_each_other_are_measured_once(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(kept_times, "lasting_folder", lambda: (tmp_path, ""))
    monkeypatch.setattr(float_where_faster, "KEPT", kept_times.KeptTimes())
    monkeypatch.setattr(float_where_faster, "kernel_seconds", lambda *given: asked.append(given[0]) or [2.0, 1.0])

    def measured(rows, outliers, **scheme):
        size = LinearSize(rows, 96, 41, 96 - outliers, torch.float32, "cpu")
        assert float_where_faster._measured(size, Scheme(**scheme)) == (2.0, 1.0)

    for sizes in ((1560, 30), (1600, 33), (4680, 30), (10**6, 40), (3, 0), (0, 0)):
        measured(*sizes)
    assert [(size.rows, size.split) for size in asked] == [(2048, 64), (4, 96), (1, 96)]
    measured(3, 0, per_token=True), measured(3, 0, weight_bits=4), measured(3, 95)
    assert len(asked) == 6 and asked[-1].split == 1, "there are no more outliers than inputs"


def test_rows_that_depend_on_the_data_are_not_measured(times, monkeypatch):
    def depends(size):
        raise ValueError(f"size {size} depends on data")

    module = fxq.quantize(toy(), [X], recipe(8), progress=False)
    monkeypatch.setattr(float_where_faster, "hint_of", depends)
    rows_ = fxq.summary(fxq.optimize(module, floats_where_faster=True)).quantized
    assert rows_ and not times
    assert all(float_where_faster._ROWS_UNKNOWN in row.remarks for row in rows_)


def test_what_cannot_be_measured_stays_and_says_why(monkeypatch):
    def fails(*given):
        raise RuntimeError("not enough memory\nfor this")

    module = fxq.quantize(toy(), [X], recipe(8), progress=False)
    monkeypatch.setattr(float_where_faster, "_measured", fails)
    fast = fxq.optimize(module, floats_where_faster=True)
    assert torch.equal(fast(X), fxq.optimize(module)(X))
    told = "could not be measured (not enough memory): stays quantized"
    assert all(told in row.remarks for row in fxq.summary(fast).quantized)


def test_a_part_of_a_rank_is_refused(times):
    module = fxq.quantize(toy(), [X], recipe(8), progress=False)
    dataclasses.replace(Facts.of(module), parallel={"rank": 0, "size": 2}).attach(module)
    with pytest.raises(PassError, match="ranks would choose differently"):
        fxq.optimize(module, floats_where_faster=True)


def test_a_margin_is_a_share():
    with pytest.raises(RecipeError, match=r"margin = 1\.0, expected at least 0 and less than 1"):
        FloatWhereFaster(margin=1.0)
    assert FloatWhereFaster.needs == Stage.FROZEN
