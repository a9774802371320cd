import copy
import dataclasses
import json

import pytest
import torch

import fxq
from fxq import kernels
from fxq.core.graph import arguments, in_order
from fxq.core.ir import LayerPlan, QuantGraph, Stage, get_tensor, plan_of, planned, set_plan
from fxq.core.layer import (
    FROZEN_QUANTIZES,
    PRODUCTS,
    LayerError,
    LayerTensors,
    Operators,
    QuantizedLayer,
    layers_reading,
    measured_pair,
    product_of,
    quantize_of,
    quantized_layers,
)
from fxq.core.pipeline import run_passes
from fxq.passes import MergeLinears
from tests.toys import recipe, rows, toy, wan_rollout

UP, DOWN = "blocks.0.up", "blocks.0.down"
FORMS = [(8, False), (4, False), (8, True), (4, True)]


def quantized(bits=8, per_token=False, **options):
    model = toy(**options)
    return model, fxq.quantize(model, [rows(40, 96)], recipe(bits, per_token=per_token), progress=False)


def layer_of(module, name=UP):
    return next(layer for layer in quantized_layers(module) if layer.name == name)


@pytest.mark.parametrize(("bits", "per_token"), FORMS)
def test_a_layer_of_a_frozen_graph_is_read_by_name(bits, per_token):
    _, q = quantized(bits, per_token)
    layer = layer_of(q)
    assert (layer.bits, layer.input_bits, layer.split, layer.per_token) == (bits, 8, 64, per_token)
    assert layer.frozen and layer.dtype == torch.float32 and layer.scheme == layer.plan.scheme
    assert (layer.weight.target, layer.weight_scale.target) == (f"{UP}.weight", f"{UP}.weight_scale")
    assert layer.offset.target == f"{UP}.offset"
    operators = Operators.of(layer.scheme)
    assert (layer.own_quantize.target, layer.operator) == (operators.quantize.definition, operators.product.definition)
    assert layer.quantize is layer.own_quantize and layer.quantization["split"] == 64
    assert [plan.layer for plan, _ in planned(q).values() if plan.scheme] == [x.name for x in quantized_layers(q)]


@pytest.mark.parametrize(("bits", "per_token"), FORMS)
def test_what_a_layer_stores_stands_for_the_float_layer(bits, per_token):
    model, q = quantized(bits, per_token)
    linear, layer = model.blocks[0].up, layer_of(q)
    stored = LayerTensors.of(q, layer.plan)
    integers = stored.codes()
    assert integers.dtype == torch.int8 and integers.shape == (64, 96)
    assert torch.equal(integers, layer.codes(q))
    step = float(stored.weight_scale.max())
    assert float((stored.float_weight() - linear.weight).detach().abs().max()) <= 1.01 * step
    torch.testing.assert_close(stored.bias(), linear.bias.detach().double(), atol=1e-4, rtol=0)
    assert set(stored.by_name()) == {
        name.removeprefix(f"{UP}.") for name, _ in q.named_buffers() if name.startswith(UP)
    }
    assert stored.weight is get_tensor(q, f"{UP}.weight")


def test_every_operator_says_by_its_schema_whether_it_multiplies_for_a_layer():
    assert {op.name for op in kernels.OPS if op.definition in PRODUCTS} == {
        "dual_scale_linear",
        "dual_scale_linear_add",
        "dual_scale_linear_quantize",
        "dual_scale_linear_per_token",
        "dual_scale_linear_per_token_add",
        "dual_scale_linear_fp8",
        "dual_scale_linear_fp8_per_token",
    }


def test_layers_of_an_optimized_graph_are_read_through_merges_fusions_and_panels():
    rollout = wan_rollout()
    q = fxq.quantize(rollout.denoiser, rollout, recipe(4), progress=False)
    before = {layer.name: layer.codes(q) for layer in quantized_layers(q)}
    optimized = fxq.optimize(q)
    after = list(quantized_layers(optimized))
    assert {layer.name for layer in after} == set(before)
    joint = {layer.name: layer for layer in after if layer.product is not layer.node}
    assert {name.rsplit(".", 1)[1] for name in joint} >= {"q", "k", "v"} and not any(x.frozen for x in joint.values())
    assert len({joint[f"blocks.0.self_attn.{name}"].product for name in "qkv"}) == 1
    merged = joint["blocks.0.self_attn.q"].codes(optimized)
    assert torch.equal(merged, torch.cat([before[f"blocks.0.self_attn.{name}"] for name in "qkv"]))
    fused = {layer.operator for layer in after}
    assert kernels.dual_scale_linear_add.definition in fused
    for layer in after:
        operands = layer.operands(optimized)
        assert operands["offset"].shape[0] >= layer.plan.out_features and operands["weight"].ndim in (2, 4)


@pytest.mark.parametrize("per_token", [False, True])
def test_layers_reading_sees_the_parts_of_a_joint_product(per_token):
    rollout = wan_rollout()
    q = fxq.quantize(rollout.denoiser, rollout, recipe(8, per_token=per_token), progress=False)
    graph = run_passes(QuantGraph(q, Stage.FROZEN).fork(), (MergeLinears(),))
    quantize = quantize_of(product_of(planned(graph.module)["blocks.0.self_attn.k"][1][0]))
    assert quantize.target in FROZEN_QUANTIZES
    assert layers_reading(quantize) == [f"blocks.0.self_attn.{name}" for name in "qkv"]


def damaged(change):
    def build(per_token):
        _, q = quantized(8, per_token)
        layer = layer_of(q)
        change(layer, q)
        return layer

    return build


def other_scales(layer, q):
    layer.set_arguments(input_scale=layer_of(q, DOWN).arguments["input_scale"])


def other_integers(layer, q):
    layer.set_arguments(q=layer_of(q, DOWN).arguments["q"])


def no_integers(layer, q):
    layer.set_arguments(q=next(iter(q.graph.nodes)))


def no_node(layer, q):
    layer.set_arguments(q=None)


def as_the_other_scheme(layer, q):
    scheme = dataclasses.replace(layer.scheme, per_token=not layer.per_token)
    set_plan(layer.node, dataclasses.replace(layer.plan, scheme=scheme))


def test_scales_of_another_layer_are_not_a_layer_of_a_frozen_graph():
    layer = damaged(other_scales)(True)
    with pytest.raises(LayerError, match="no product of its quantized input"):
        _ = layer.own_quantize
    layer = damaged(other_integers)(True)
    with pytest.raises(LayerError, match="no product of its quantized input"):
        _ = layer.quantization


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("change", [no_integers, no_node, as_the_other_scheme])
def test_another_quantize_than_the_schemes_is_refused(change, per_token):
    layer = QuantizedLayer.of(damaged(change)(per_token).node)
    with pytest.raises(LayerError, match=f"node {layer.product.name} is no product of its quantized input"):
        _ = layer.input_bits


def test_integers_that_come_from_no_node_have_no_quantize():
    assert damaged(no_node)(True).quantize is None


def test_nodes_that_are_no_layer_are_refused_with_the_reason():
    _, q = quantized()
    layer, head = layer_of(q), planned(q)["head"][1][0]
    with pytest.raises(LayerError, match=f"{layer.quantize.name} is no quantized layer: no plan"):
        QuantizedLayer.of(layer.quantize)
    with pytest.raises(LayerError, match=r"linear.* is no quantized layer: prediction head"):
        QuantizedLayer.of(head)
    set_plan(layer.quantize, layer.plan)
    with pytest.raises(LayerError, match=r"the plan lies on fxq\.quantize_act\.default"):
        QuantizedLayer.of(layer.quantize)
    assert product_of(head) is None and measured_pair(head) is None


def test_arguments_that_are_no_stored_tensor_or_no_number_are_refused():
    _, q = quantized()
    layer = layer_of(q)
    layer.set_arguments(offset=None, split=layer.node)
    with pytest.raises(LayerError, match=rf"{layer.product.name} does not read stored tensors .*: offset is None"):
        layer.operands(q)
    with pytest.raises(LayerError, match=r"split of dual_scale_linear.* is dual_scale_linear"):
        _ = layer.split


def test_arguments_are_replaced_by_name():
    _, q = quantized()
    layer = layer_of(q)
    old = layer.node.args
    layer.set_arguments(bits=5, split=32)
    assert layer.node.args == (*old[:5], 32, 5, *old[7:]) and not layer.node.kwargs
    assert in_order(layer.operator, arguments(layer.node)) == layer.node.args


@pytest.fixture
def parsed(monkeypatch):
    """Layers whose plans were parsed."""
    layers, parse = [], LayerPlan.from_json.__func__

    def counting(cls, data):
        layers.append(data["layer"])
        return parse(cls, data)

    monkeypatch.setattr(LayerPlan, "from_json", classmethod(counting))
    return layers


def test_plans_are_not_parsed_while_a_model_is_quantized_and_optimized(parsed):
    _, q = quantized(blocks=2)
    fxq.summary(fxq.optimize(q))
    assert parsed == []


def test_plans_of_a_bundle_are_parsed_once_each(parsed, tmp_path):
    _, q = quantized(blocks=2)
    fxq.save(q, tmp_path / "bundle")
    fxq.summary(fxq.optimize(fxq.load(tmp_path / "bundle")))
    assert sorted(parsed) == sorted(planned(q))


def test_a_plan_that_a_tool_copied_as_json_is_parsed_once(parsed):
    _, q = quantized()
    node = layer_of(q).node
    node.meta["custom"] = json.loads(json.dumps(node.meta["custom"]))
    assert plan_of(node) == plan_of(node) == layer_of(q).plan and parsed == [UP]
    assert copy.deepcopy(node.meta["custom"]) == node.meta["custom"] and parsed == [UP]
