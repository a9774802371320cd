"""Layers of float8, from the plan to the optimized graph."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fxq
from fxq.capture.trace import trace
from fxq.core.config import Budget, RecipeError
from fxq.core.ir import QuantGraph, Stage, get_tensor, plan_of, planned, put_tensor, set_plan
from fxq.core.layer import QuantizedLayer, quantized_layers
from fxq.core.method import FLOAT8
from fxq.core.pipeline import PassError, run_passes
from fxq.core.verify import RuleError, check
from fxq.kernels import float8
from fxq.passes import PlanLayers
from fxq.passes.fusions.merge_linears import MergeLinears
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.ranges import MinMax, RangeSearch
from fxq.passes.qdq.to_qdq import ToQdq
from tests.toys import QUICK, recipe, relative_error, rows, toy, wan_rollout

UP = "blocks.0.up"
X = rows(2, 21, 96)
OPERATORS = {
    True: (torch.ops.fxq.quantize_fp8_per_token.default, torch.ops.fxq.dual_scale_linear_fp8_per_token.default),
    False: (torch.ops.fxq.quantize_fp8.default, torch.ops.fxq.dual_scale_linear_fp8.default),
}


def fp8(per_token=False, methods=QUICK, **options):
    return recipe(methods=methods, format=FLOAT8, per_token=per_token, **options)


def quantized(per_token=False, model=None, **options):
    return fxq.quantize(model or toy(), [X], fp8(per_token, **options), progress=False)


@pytest.fixture(params=[False, True], ids=["static", "per token"])
def per_token(request):
    return request.param


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_is_quantized(per_token, dual, bias):
    model = toy(bias=bias)
    q = quantized(per_token, model, dual_scale=dual)
    assert relative_error(model, q, X) < 0.04
    if per_token:
        assert relative_error(model, q, X * torch.logspace(-3, 3, 21)[:, None]) < 0.04
    calls = [node.target for node in q.graph.nodes if str(node.target).startswith("fxq.")]
    assert calls == [*OPERATORS[per_token]] * 2


def test_scales_per_token_need_no_data():
    q = fxq.quantize(toy(), None, fp8(True), example_inputs=X, progress=False)
    assert relative_error(toy(), q, X) < 0.04
    assert all(plan.output_sqnr is None for plan, _ in planned(q).values())


@pytest.mark.parametrize("dual", [False, True])
def test_a_layer_computes_the_simulation_in_floats(per_token, dual):
    model = toy()
    q = quantized(per_token, model, dual_scale=dual)
    plan, nodes = planned(q)[UP]
    layer, tensors = QuantizedLayer.of(nodes[0]), {n.rpartition(".")[2]: t for n, t in q.named_buffers() if UP in n}
    names = {"weight", "weight_scale", "offset"} | ({"perm"} if dual else set())
    assert set(tensors) == names | (set() if per_token else {"input_scale"}) and bool(plan.outliers) == dual
    assert tensors["weight"].dtype == float8.E4M3 and torch.equal(tensors["offset"], model.blocks[0].up.bias)
    assert layer.codes(q) is tensors["weight"] and (layer.bits, layer.input_bits) == (8, 8)
    x = X[..., tensors["perm"]] if dual else X
    if per_token:
        rounded = float8.dequantize_per_token(*float8.quantize_per_token(x, plan.split), plan.split)
    else:
        scale = tensors["input_scale"]
        rounded = float8.dequantize_input(float8.quantize_input(x, scale, plan.split), scale, plan.split)
    group = (torch.arange(96) >= plan.split).long()
    weight = tensors["weight"].float() * tensors["weight_scale"][group].T
    want = model.blocks[0].down(F.gelu(F.linear(rounded, weight, tensors["offset"])))
    assert relative_error(lambda x: x + want, q_until_head(q), X) < 0.03


def q_until_head(q):
    """The blocks of a toy: its head reads what they give."""
    seen = []
    node = next(n for n in q.graph.nodes if "head" in str(n.args))
    source = node.all_input_nodes[0]
    interpreter = torch.fx.Interpreter(q)

    def run(x):
        interpreter.run(x)
        return seen[0]

    original = interpreter.run_node
    interpreter.run_node = lambda n: keep(n, original(n))

    def keep(n, value):
        if n is source:
            seen.append(value)
        return value

    return run


def test_weights_are_the_nearest_numbers_under_their_scales(per_token):
    model = toy()
    q = quantized(per_token, model, dual_scale=False)
    weight, scale = get_tensor(q, f"{UP}.weight"), get_tensor(q, f"{UP}.weight_scale")
    want = (model.blocks[0].up.weight / scale[0][:, None]).clamp(-448, 448).to(float8.E4M3)
    assert torch.equal(weight.view(torch.uint8), want.view(torch.uint8))
    assert planned(q)[UP][0].output_sqnr > 25


def test_a_plan_says_so_and_an_old_plan_is_of_integers(per_token):
    plan = planned(quantized(per_token))[UP][0]
    label = "FP8 per token" if per_token else "FP8"
    assert plan.quantization.detail == label and plan.to_json()["scheme"]["format"] == FLOAT8
    assert type(plan).from_json(plan.to_json()) == plan
    old = planned(fxq.quantize(toy(), [X], recipe(8), progress=False))[UP][0]
    assert "format" not in old.to_json()["scheme"] and type(old).from_json(old.to_json()) == old


def test_siblings_are_one_product(per_token):
    rollout = wan_rollout()
    q = fxq.quantize(rollout.denoiser, rollout, fp8(per_token), progress=False)
    graph = run_passes(QuantGraph(q, Stage.FROZEN).fork(), (MergeLinears(),))
    layers = {layer.name: layer for layer in quantized_layers(graph.module)}
    assert len({layers[f"blocks.0.self_attn.{name}"].product for name in "qkv"}) == 1
    args, _ = rollout.example_call()[:2]
    found = [torch.utils._pytree.tree_leaves(module(*args)) for module in (q, graph.module)]
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_an_optimized_module_computes_the_same_and_says_that_nothing_is_gained(per_token):
    q = quantized(per_token)
    fast = fxq.optimize(q)
    assert relative_error(q, fast, X) < 1e-6
    told = str(fxq.summary(fast))
    assert told.count("reference in float32") == 2 and "float8 has no CPU kernel" in told
    assert "a CPU has no FP8 arithmetic" in told and "GPUs from sm_89 on multiply FP8" in told


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(per_token, dtype):
    model = toy().to(dtype)
    x = X.to(dtype)
    q = fxq.quantize(model, [x], fp8(per_token), progress=False)
    assert q(x).dtype == dtype and relative_error(model, q, x) < 0.05


def test_narrow_layers_are_quantized_too(per_token):
    model = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.ReLU(), torch.nn.Linear(24, 5)).eval()
    x = rows(30, 8)
    q = fxq.quantize(model, [x], fp8(per_token), progress=False)
    assert len(fxq.summary(q).quantized) == 2 and relative_error(model, q, x) < 0.05


def test_what_is_not_finite_stays_visible(per_token):
    q = quantized(per_token)
    x = X.clone()
    x[0, 3, 5], x[1, 7, 90] = float("nan"), float("inf")
    shown = q(x).isnan().all(-1)
    assert shown.nonzero().tolist() == [[0, 3], [1, 7]]


def test_methods_of_integers_are_refused_before_anything_is_calibrated():
    graph = trace(toy(), (X,))
    with pytest.raises(RecipeError, match=r"layer blocks.0.up: GPTQ chooses integers, .* float8_e4m3fn. Name RangeSe"):
        run_passes(graph, (PlanLayers(fp8(methods=(RangeSearch(), GPTQ()))),))


def test_layers_that_nothing_is_learned_of_are_left_to_the_methods_that_do():
    mixed = dataclasses.replace(recipe(8, methods=(MinMax(), GPTQ())), rules=(
        fxq.Rule("*.up", fxq.Scheme(format=FLOAT8, reconstruct=False)), *recipe(8).rules,
    ))  # fmt: skip
    q = fxq.quantize(toy(), [X], mixed, progress=False)
    assert [plan.quantization.label for plan, _ in planned(q).values() if plan.scheme] == ["FP8", "W8A8"]
    assert relative_error(toy(), q, X) < 0.04
    with pytest.raises(RecipeError, match="GPTQ chooses integers"):
        fxq.quantize(toy(), [X], dataclasses.replace(mixed, methods=(GPTQ(),)), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fp8"}, "format = 'fp8': expected 'int' or 'float8_e4m3fn'"),
        ({"format": FLOAT8, "weight_bits": 4}, "weight_bits = 4, input_bits = 8 with format .* leave both at 8"),
        ({"format": FLOAT8, "input_bits": 6}, "input_bits = 6 with format"),
        ({"format": FLOAT8, "per_token": True, "asymmetric": True}, "which has no zero point"),
    ],
)
def test_schemes_that_float8_is_not_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        fxq.Scheme(**options)


def test_a_budget_is_refused():
    with pytest.raises(RecipeError, match=r"rule '\*': format 'float8_e4m3fn' with a budget, which chooses the bits"):
        fxq.Recipe(name="x", rules=(fxq.Rule("*", fxq.Scheme(format=FLOAT8)),), methods=QUICK, budget=Budget(ratio=0.5))


def test_the_form_of_integers_is_refused(per_token):
    graph = QuantGraph(quantized(per_token), Stage.FROZEN).fork()
    with pytest.raises(
        PassError, match=r"layer blocks.0.up and 1 more are float8_e4m3fn: this form multiplies integers"
    ):
        run_passes(graph, (ToQdq(),))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight", torch.zeros(64, 96, dtype=torch.int8), "weight dtype torch.int8"),
        ("weight", torch.zeros(64, 95).to(float8.E4M3), r"weight \(64, 95\), expected \(64, 96\)"),
        ("weight_scale", torch.full((2, 64), float("inf")), "not finite"),
    ],
)
def test_the_rules_see_what_does_not_fit(per_token, name, tensor, message):
    q = quantized(per_token)
    graph = QuantGraph(q, Stage.FROZEN).fork()
    put_tensor(graph.module, f"{UP}.{name}", tensor)
    with pytest.raises(RuleError, match=message):
        check(graph, "in a test")


def test_a_product_of_another_format_than_planned_is_seen(per_token):
    graph = QuantGraph(quantized(per_token), Stage.FROZEN).fork()
    node = planned(graph.module)[UP][1][0]
    plan = plan_of(node)
    other = dataclasses.replace(plan, scheme=dataclasses.replace(plan.quantization, format="int"))
    set_plan(node, other)
    with pytest.raises(RuleError, match=r"its product is fxq.dual_scale_linear_fp8.*the plan says W8A8"):
        check(graph, "in a test")


@pytest.mark.parametrize("name", ["fp8", "fp8-dynamic"])
def test_the_presets(name):
    preset = fxq.recipes.get_recipe(name)
    schemes = {rule.scheme for rule in preset.rules if rule.scheme is not None}
    detail = "FP8 per token" if name.endswith("dynamic") else "FP8"
    assert {s.detail for s in schemes} == {detail} and not any(s.dual_scale for s in schemes)
    assert fxq.recipes.recipe_from_json(fxq.recipes.recipe_to_json(preset)) == preset
    assert f'format = "{FLOAT8}"' in fxq.recipes.recipe_to_toml(preset)
