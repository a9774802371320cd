import dataclasses

import pytest
import torch

import fxq
from fxq import numerics
from fxq.core.deviation import deviation_in_steps, most_deviation
from fxq.core.layer import quantized_layers
from fxq.integrations.swap import ApplyError
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


def test_rounding_is_a_step_at_most():
    assert most_deviation(None) == most_deviation(0.3) == 1
    assert 2.5 < most_deviation(2.5) < 2.6


def correlated(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 12, generator=generator) @ rows(12, 96, seed=77) / 3


@pytest.mark.parametrize("preset", ["w4a8", "w4a8-token", "q_arvd-w4a8"])
def test_a_model_that_was_quantized_is_known_by_its_weights_and_another_is_not(preset, tmp_path):
    model, data = toy(blocks=2), [correlated(300, seed) for seed in range(3)]
    recipe = fxq.recipes.with_iterations(fxq.PRESETS[preset], 5)
    fxq.save(fxq.quantize(model, data, recipe, progress=False), tmp_path / "b")
    bundle = fxq.load(tmp_path / "b")
    moved = [layer.plan.weight_deviation for layer in quantized_layers(bundle)]
    assert all((known is None) == preset.startswith("q_arvd") for known in moved)
    swapped = fxq.apply(toy(blocks=2), bundle)
    assert torch.allclose(swapped(data[0]), bundle(data[0]), atol=1e-4)
    for change in (other_weight, other_bias):
        with pytest.raises(ApplyError, match=r"other weights|another bias"):
            fxq.apply(change(toy(blocks=2)), bundle)


def other_weight(model):
    linear = model.blocks[0].up
    with torch.no_grad():
        linear.weight.add_(1.5 * linear.weight.std() * rows(*linear.weight.shape, seed=5))
    return model


def other_bias(model):
    with torch.no_grad():
        model.blocks[1].down.bias.add_(0.5)
    return model


def test_plans_without_deviations_keep_their_form():
    plan = fxq.core.ir.LayerPlan(layer="a", in_features=4, out_features=4)
    assert not {"weight_deviation", "bias_deviation"} & set(plan.to_json())
    moved = dataclasses.replace(plan, weight_deviation=1.5, bias_deviation=0.25)
    assert fxq.core.ir.LayerPlan.from_json(moved.to_json()) == moved
