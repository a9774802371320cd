import copy
import dataclasses

import pytest
import torch
from torch import nn

import fxq
from fxq.core.facts import Facts
from fxq.core.ir import get_tensor
from tests.calibration.test_calibrate import Keywords
from tests.toys import LEARN, recipe, relative_error, rows, toy, wan_rollout

X = rows(40, 96)


def one(**options):
    return fxq.quantize(toy(), [X], recipe(), **options)


def snapshot(model):
    return {name: (t, t.clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_quantized_model_is_close_and_the_users_model_unchanged(bits, dtype):
    model = toy(width=128, hidden=160).to(dtype)
    before, x = snapshot(model), rows(40, 128).to(dtype)
    q = fxq.quantize(model, [x], recipe(bits, methods=LEARN))
    assert relative_error(model, q, x) < (0.15 if bits == 4 else 0.02)
    assert q(x).dtype == dtype
    after = model.state_dict(keep_vars=True)
    for name, (tensor, value, grad) in before.items():
        assert after[name] is tensor and torch.equal(tensor, value) and tensor.requires_grad == grad


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.53), (4, 0.30)])
def test_weights_are_integers_and_no_float_weight_is_left(bits, limit):
    model = toy(width=256, hidden=288, blocks=2)
    q = fxq.quantize(model, [rows(9, 256)], recipe(bits))
    for row in fxq.summary(q).quantized:
        weight = get_tensor(q, f"{row.layer}.weight")
        assert weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
        assert weight.shape == (row.shape[0], row.shape[1] // (2 if bits == 4 else 1))
    assert fxq.summary(q).ratio <= limit
    large = [name for name, t in q.state_dict().items() if t.is_floating_point() and t.ndim == 2 and t.shape[0] > 2]
    assert large == ["head.weight"]
    assert {str(n.target) for n in q.graph.nodes if "fxq" in str(n.target)} == {
        "fxq.quantize_act.default",
        "fxq.dual_scale_linear.default",
    }


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_activations_of_any_width_lie_in_int8(bits):
    q = fxq.quantize(toy(), [X], recipe(input_bits=bits))
    node = next(n for n in q.graph.nodes if "quantize_act" in str(n.target))
    scale, zero = (get_tensor(q, f"blocks.0.up.{name}") for name in ("input_scale", "input_zero_point"))
    perm = get_tensor(q, "blocks.0.up.perm")
    integers = fxq.kernels.quantize_act(X, perm, scale, zero, 64, bits)
    assert node.args[5] == bits and integers.dtype == torch.int8
    assert int(integers.max()) - int(integers.min()) <= 2**bits - 1


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "batch", "generator", "one-shot", "loop"])
def test_every_form_of_data_gives_the_same_model(form):
    data = [rows(7, 96, seed=s) for s in (1, 2, 3)]

    class OneShot:
        def __init__(self):
            self.iterator = iter(data)

        def __iter__(self):
            return self.iterator

    def loop(model):
        for x in data:
            model(x)

    loaders = {
        "tensor": data,
        "tuple": [(x,) for x in data],
        "list": [[x] for x in data],
        "dict": [{"x": x} for x in data],
        "batch": [fxq.Batch((x,)) for x in data],
        "generator": (x for x in data),
        "one-shot": OneShot(),
    }
    want = fxq.quantize(toy(), data, recipe())
    if form == "loop":
        got = fxq.quantize(toy(), None, recipe(), forward_loop=loop, example_inputs=data[0])
    else:
        got = fxq.quantize(toy(), loaders[form], recipe())
    assert torch.equal(got(X[:7]), want(X[:7]))
    assert fxq.summary(got).facts["calibration_hash"] == fxq.summary(want).facts["calibration_hash"]


def test_modules_graph_modules_and_exported_programs_are_models():
    model = toy()
    want = fxq.quantize(model, [X], recipe())(X)
    for form in (torch.fx.symbolic_trace(model), torch.export.export(model, (X,))):
        assert torch.equal(fxq.quantize(form, [X], recipe())(X), want)


def test_outputs_and_arguments_keep_their_structure():
    inputs = {"a": rows(3, 64), "b": rows(3, 48)}
    model = Keywords().eval()
    q = fxq.quantize(model, [fxq.Batch((inputs,), {"gain": torch.ones(1)})], recipe())
    got = q(inputs, gain=torch.full((1,), 2.0))
    assert set(got) == {"y"} and got["y"].shape == (3, 32)
    swapped = q({"b": inputs["b"], "a": inputs["a"]}, gain=torch.full((1,), 2.0))
    assert torch.equal(got["y"], swapped["y"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode):
    model = toy()
    want = fxq.quantize(model, [X], recipe(methods=LEARN))(X)
    with mode():
        q = fxq.quantize(model, [X], recipe(methods=LEARN))
    assert torch.equal(q(X), want) and not q(X).requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of calib_loader and forward_loop"),
        ({"calib_loader": [X], "forward_loop": print}, "give exactly one of calib_loader and forward_loop"),
        ({"forward_loop": print}, "without a calib_loader no inputs are known before tracing: pass example_inputs"),
        ({"calib_loader": []}, "yielded no batch"),
        ({"calib_loader": iter(())}, "yielded no batch"),
        ({"calib_loader": 5}, "calib_loader is int, expected an iterable of batches"),
        ({"calib_loader": ["words"]}, "yielded str; expected a dict"),
        ({"calib_loader": [X, object()]}, "yielded object; expected a dict"),
        ({"calib_loader": [X, X[:, :5]]}, r"calibration batch 1 does not fit .* Its inputs: \[\(40, 5\)\]"),
        ({"calib_loader": [X, {"y": X}]}, r"missing \['x'\], unknown \['y'\]"),
        ({"calib_loader": [X, X * torch.nan]}, "layer blocks.0.up: its input has NaN or infinity"),
        ({"forward_loop": lambda run: None, "example_inputs": X}, "received no calibration row: blocks.0.up"),
    ],
)
def test_data_that_cannot_calibrate_is_refused(arguments, message):
    with pytest.raises(fxq.CalibrationError, match=message):
        fxq.quantize(toy(), recipe=recipe(), **arguments)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused_unless_excluded(value):
    model = toy()
    with torch.no_grad():
        model.blocks[0].down.weight[3, 4] = value
    with pytest.raises(fxq.RecipeError, match=r"layer blocks.0.down: 1 of 6144 weights are NaN or infinite"):
        fxq.quantize(model, [X], recipe())
    plain = recipe()
    kept = dataclasses.replace(plain, rules=(fxq.Rule("blocks.0.down", None), *plain.rules))
    q = fxq.quantize(model, [X], kept)
    assert [row.layer for row in fxq.summary(q).quantized] == ["blocks.0.up"]


def test_a_recipe_that_quantizes_nothing_says_why():
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    with pytest.warns(UserWarning, match="quantizes no linear of 2: 2 x in_features 24 is not a multiple of 32"):
        q = fxq.quantize(model, [torch.randn(2, 24)], recipe(bits=4), progress=False)
    assert not fxq.summary(q).quantized


def test_a_pattern_that_matches_nothing_is_refused():
    plain = recipe()
    wrong = dataclasses.replace(plain, rules=(fxq.Rule("block.0.up", None), *plain.rules))
    with pytest.raises(fxq.RecipeError, match=r"'block.0.up' matches no layer; close names: blocks.0.up"):
        fxq.quantize(toy(), [X], wrong)


def test_a_recipe_without_methods_is_refused_before_any_work():
    with pytest.raises(fxq.RecipeError, match="'w8a8' has no method"):
        fxq.quantize(toy(), [X], recipe(methods=()))


def test_a_model_that_cannot_be_captured_is_refused():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(fxq.TraceError, match="cannot capture Branch"):
        fxq.quantize(Branch(), [X], recipe())


def test_a_model_without_linears_is_refused():
    with pytest.raises(fxq.RecipeError, match=r"pattern '\*' matches no layer; the model has 0 linears"):
        fxq.quantize(nn.Sequential(nn.ReLU()), [X], recipe())


def test_widths_that_are_no_multiple_of_the_block_are_single_scale_or_kept():
    model, x = toy(width=50, hidden=37), rows(20, 50)
    q = fxq.quantize(model, [x], recipe(8))
    assert [(row.layer, row.outliers) for row in fxq.summary(q).quantized] == [("blocks.0.up", 0), ("blocks.0.down", 0)]
    assert relative_error(model, q, x) < 0.02
    four = fxq.quantize(model, [x], recipe(4))
    assert [row.reason for row in fxq.summary(four).kept[:2]] == [
        f"in_features {width} is not a multiple of 32, the int4 packing block" for width in (50, 37)
    ]
    assert torch.equal(four(x), model(x))
    groups = fxq.summary(fxq.quantize(model, [x], recipe(4, weight_group=32))).kept[:2]
    assert [row.reason for row in groups] == [
        row.reason.replace("the int4 packing block", "a group of weights") for row in fxq.summary(four).kept[:2]
    ]


def test_layers_that_no_call_reaches_are_listed():
    model = toy()
    model.spare = nn.Linear(5, 5)
    summary = fxq.summary(fxq.quantize(model, [X], recipe()))
    assert summary.facts["never_called"] == ["spare"]
    assert summary.rows[-1].reason == "never called in the captured graph"


def test_a_summary_counts_and_prints_every_linear():
    summary = fxq.summary(one())
    assert (len(summary.quantized), len(summary.kept)) == (2, 1)
    text = str(summary)
    assert "2 linears quantized, 1 kept" in text and "blocks.0.up" in text and "prediction head" in text
    assert '"size_ratio_to_bf16"' in summary.to_json()


def test_a_plain_module_has_no_summary():
    with pytest.raises(ValueError, match=r"this Toy was not made by fxq\.quantize or fxq\.load"):
        fxq.summary(toy())


def test_a_deep_copy_is_still_a_quantized_model():
    q = one()
    again = copy.deepcopy(q)
    assert torch.equal(again(X), q(X)) and fxq.summary(again).to_json() == fxq.summary(q).to_json()


def test_quantizing_twice_gives_the_same_bits():
    assert all(torch.equal(a, b) for a, b in zip(one().state_dict().values(), one().state_dict().values(), strict=True))


def test_scales_are_not_cast_to_half_precision():
    q = one()
    with pytest.raises(
        TypeError, match=r"cannot be cast from torch\.float32 to torch\.bfloat16: its scales are float32"
    ):
        q.to(torch.bfloat16)
    assert q.get_buffer("blocks.0.up.input_scale").dtype == torch.float32


def test_a_killed_run_resumes_with_the_same_result(tmp_path):
    want = one().state_dict()
    first = one(checkpoint_dir=tmp_path)
    files = sorted(file.name for file in tmp_path.iterdir())
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = one(checkpoint_dir=str(tmp_path))
    assert files == ["blocks.0.down.safetensors", "blocks.0.up.safetensors"]
    assert stamps == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    for q in (first, again):
        assert all(torch.equal(want[name], tensor) for name, tensor in q.state_dict().items())


@pytest.mark.parametrize("weighting", ["exponential", "sensitivity", "reversed"])
def test_chunks_of_a_plain_loader_are_weighted(weighting):
    data = [fxq.Batch((rows(9, 96, seed=c),), chunk=c) for c in (0, 1)]
    given = None if weighting == "exponential" else [0.75, 0.25]
    q = fxq.quantize(toy(), data, recipe(weighting=weighting), sensitivity=given)
    want = {"exponential": [4 / 3, 2 / 3], "sensitivity": [1.5, 0.5], "reversed": [0.5, 1.5]}[weighting]
    assert fxq.summary(q).facts["chunk_weights"] == pytest.approx(want)


def test_a_plain_loader_without_sensitivity_weighs_chunks_the_same():
    data = [fxq.Batch((X,), chunk=c) for c in (0, 3)]
    q = fxq.quantize(toy(), data, recipe(weighting="sensitivity"))
    assert fxq.summary(q).facts["chunk_weights"] == [1.0] * 4


def test_a_sensitivity_of_too_few_chunks_is_refused():
    with pytest.raises(fxq.CalibrationError, match="sensitivity has 1 chunks, the calibration data 3"):
        fxq.quantize(toy(), [fxq.Batch((X,), chunk=2)], recipe(weighting="sensitivity"), sensitivity=torch.ones(1))


@pytest.fixture(scope="module")
def wan():
    rollout = wan_rollout()
    return rollout, fxq.quantize(rollout.denoiser, rollout, recipe(8, methods=LEARN, weighting="sensitivity"))


def test_a_rollout_is_quantized_with_its_sensitivity(wan):
    rollout, q = wan
    summary = fxq.summary(q)
    quantized = {row.layer: row for row in summary.quantized}
    assert set(quantized) == {
        "text_embedding.0",
        "text_embedding.2",
        *(f"blocks.0.{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"),
        "blocks.0.ffn.0",
        "blocks.0.ffn.2",
    }
    assert quantized["blocks.0.self_attn.q"].outliers == 32
    assert sum(summary.facts["sensitivity"]) == pytest.approx(1)
    assert sum(summary.facts["chunk_weights"]) == pytest.approx(3)
    latents = rollout.rollout(*rollout.batches[0])
    with rollout.using(q):
        again = rollout.rollout(*rollout.batches[0])
    assert float((latents - again).norm() / latents.norm()) < 0.1


@pytest.mark.parametrize(("seeds", "frames"), [((7,), 2), ((3,), 8), ((4, 5, 6), 4)])
def test_a_quantized_denoiser_runs_at_other_batch_sizes_and_prefix_lengths(wan, seeds, frames):
    _, q = wan
    rollout = wan_rollout(seeds, frames)
    shapes = []
    rollout.denoiser.register_forward_pre_hook(lambda _, args: shapes.append(args[5][0].shape[:2]))
    want = rollout.rollout(*rollout.batches[0])
    with rollout.using(q):
        got = rollout.rollout(*rollout.batches[0])
    assert {tuple(shape) for shape in shapes} == {(len(seeds), 6 * start) for start in range(0, frames, 2)}
    assert got.shape == want.shape and float((got - want).norm() / want.norm()) < 0.15


def test_a_linear_without_weights_is_kept_with_its_reason():
    class Empty(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.none, self.some = torch.nn.Linear(96, 0), torch.nn.Linear(96, 32)

        def forward(self, x):
            return self.some(x), self.none(x)

    quantized = fxq.quantize(Empty().eval(), [X], recipe(8), progress=False)
    reasons = {row.layer: row.reason for row in fxq.summary(quantized).rows}
    assert reasons["none"] == "its weight is empty" and quantized(X)[1].shape == (len(X), 0)


def test_one_chunk_has_nothing_to_be_compared_with(monkeypatch):
    monkeypatch.setattr("fxq.job.Job.measure", None)
    rollout = wan_rollout(frames=2)
    quantized = fxq.quantize(rollout.denoiser, rollout, recipe(weighting="sensitivity"), progress=False)
    assert Facts.of(quantized).sensitivity is None and Facts.of(quantized).chunk_weights == [1.0]


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.generator = model

    def forward(self, *args):
        return self.generator(*args)


@pytest.mark.parametrize("wrap", [Wrapper, nn.Sequential, lambda model: Wrapper(Wrapper(model))])
def test_a_preset_keeps_the_same_layers_of_a_model_in_a_wrapper(wrap):
    model = toy(blocks=2)
    kept = {row.layer for row in fxq.summary(fxq.quantize(model, [rows(5, 96)], recipe(), progress=False)).kept}
    wrapped = fxq.quantize(wrap(model).eval(), [rows(5, 96)], recipe(), progress=False)
    assert kept == {"head"}
    assert {row.layer.rpartition(".")[2] for row in fxq.summary(wrapped).kept} == kept


class Pair(torch.nn.Module):
    """Two inputs of one batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(96, 32), torch.nn.Linear(64, 32)

    def forward(self, x, t):
        return self.a(x) + self.b(t)[:, None]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("form", [tuple, dict])
def test_a_first_batch_of_any_size_lets_the_others_vary(first, form):
    def item(count, seed):
        x, t = rows(count, 5, 96, seed=seed), rows(count, 64, seed=seed)
        return (x, t) if form is tuple else {"x": x, "t": t}

    torch.manual_seed(0)
    model = Pair().eval()
    q = fxq.quantize(model, [item(first, 1), item(9, 2)], recipe(), progress=False)
    for count in (1, 2, 3, 9, 17):
        x, t = rows(count, 5, 96, seed=2), rows(count, 64, seed=3)
        assert relative_error(model, q, x, t) < 0.03


def test_a_model_of_one_batch_stays_one():
    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(96, 32)

        def forward(self, x):
            return self.a(x.reshape(1, 5, 96))

    model = One().eval()
    q = fxq.quantize(model, [rows(1, 5, 96)], recipe(), progress=False)
    assert relative_error(model, q, rows(1, 5, 96, seed=4)) < 0.03
    with pytest.raises(ValueError, match="captured for"):
        q(rows(2, 5, 96))
