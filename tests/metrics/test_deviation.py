import dataclasses

import pytest
import torch

import fxq
from fxq import numerics
from fxq.core.layer import quantized_layers
from fxq.integrations.swap import ApplyError
from fxq.metrics.deviation import MOST_DEVIATION, deviation_in_steps
from fxq.passes.apply_methods import group_order
from tests.toys import rows, toy


@pytest.mark.parametrize(("bits", "split"), [(4, 96), (8, 64)])
def test_it_is_the_distance_in_steps(bits, split):
    scale = torch.full((1 if split == 96 else 2, 13), 0.25)
    codes = torch.randint(-5, 6, (13, 96), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    weight = numerics.dequantize_weight(codes, scale, split)
    assert deviation_in_steps(weight, codes, scale, split, bits) == 0
    assert deviation_in_steps(weight + 0.125, codes, scale, split, bits) == pytest.approx(0.5)


def test_clipped_integers_do_not_count():
    codes = torch.tensor([[7, 7, 1, 2] * 8], dtype=torch.int8)
    weight = torch.tensor([[90.0, 8.0, 1.0, 2.0] * 8])
    assert deviation_in_steps(weight, codes, torch.ones(1, 1), 32, 4) == 0


def correlated(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 12, generator=generator) @ rows(12, 96, seed=77) / 3


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w8a8-token", "q_arvd-w8a8"])
def test_a_model_that_was_quantized_is_known_by_its_weights_and_another_is_not(preset, tmp_path):
    model, data = toy(blocks=2), [correlated(300, seed) for seed in range(3)]
    recipe = fxq.presets.with_iterations(fxq.PRESETS[preset], 5)
    fxq.save(fxq.quantize(model, data, recipe, progress=False), tmp_path / "b")
    bundle = fxq.load(tmp_path / "b")
    for layer in quantized_layers(bundle):
        assert (layer.plan.bias_deviation is None) == preset.startswith("q_arvd")
        weight, codes = model.get_submodule(layer.name).weight.detach(), bundle.get_buffer(f"{layer.name}.weight")
        weight = weight[:, group_order(layer.plan)]
        codes = numerics.unpacked(codes, layer.scheme.weight_bits)
        scale = bundle.get_buffer(f"{layer.name}.weight_scale")
        apart = deviation_in_steps(weight, codes, scale, layer.plan.split, layer.scheme.weight_bits)
        assert apart < 0.75 < MOST_DEVIATION
    swapped = fxq.apply(toy(blocks=2), bundle)
    assert torch.allclose(swapped(data[0]), bundle(data[0]), atol=1e-4)
    with pytest.raises(ApplyError, match="another bias"):
        fxq.apply(changed(toy(blocks=2), "blocks.1.down.bias", 0.5), bundle)
    part = 1.5 if "w4" in preset else 0.1  # a part that is some steps of either width
    with pytest.raises(ApplyError, match="other weights"):
        fxq.apply(changed(toy(blocks=2), "blocks.0.up.weight", part), bundle)


def changed(model, name, part):
    """The model with noise of a part of its size added to a parameter."""
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter.add_(part * parameter.std() * rows(*parameter.shape, seed=5))
    return model


def test_plans_without_deviations_keep_their_form():
    plan = fxq.core.ir.LayerPlan(layer="a", in_features=4, out_features=4)
    assert "bias_deviation" not in plan.to_json()
    moved = dataclasses.replace(plan, bias_deviation=0.25)
    assert fxq.core.ir.LayerPlan.from_json(moved.to_json()) == moved
