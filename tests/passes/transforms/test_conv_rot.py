import pytest
import torch

from fxq.core.config import RecipeError
from fxq.passes.transforms.conv_rot import ConvRot, regular_hadamard, rotation_size
from fxq.passes.transforms.sites import layers_of
from fxq.presets import PRESETS
from fxq.recipes import recipe_from_json, recipe_to_json
from tests.toys import rewritten, rows, toy


@pytest.mark.parametrize("size", [16, 64, 256])
def test_the_matrix_is_orthonormal_symmetric_and_has_rows_of_one_sum(size):
    matrix = regular_hadamard(size)
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64)) and torch.equal(matrix, matrix.t())
    assert matrix.abs().unique().tolist() == [size**-0.5] and matrix.sum(1).allclose(torch.ones(()).double())


def test_the_largest_size_that_divides_is_taken_up_to_the_block():
    assert [rotation_size(width) for width in (1536, 192, 48, 40)] == [256, 64, 16, None]
    assert [ConvRot(block=64).size_of(width) for width in (1536, 48, 40)] == [64, 16, 1]


def test_a_rotated_model_computes_what_it_did():
    model, data = toy(), [rows(9, 96)]
    graph = rewritten(model, [ConvRot()], data)
    assert torch.allclose(graph.module(data[0]), model(data[0]), atol=1e-5)
    up = layers_of(graph.module)["blocks.0.up"].weight(graph.module)
    turned = model.blocks[0].up.weight.unflatten(1, (-1, 16)) @ regular_hadamard(16).float()
    assert torch.allclose(up, turned.flatten(1), atol=1e-6)


def test_other_blocks_are_refused_and_recipes_name_it():
    with pytest.raises(RecipeError, match="ConvRot: block = 128, expected one of 256, 64, 16"):
        ConvRot(block=128)
    recipe = PRESETS["w8a8-single-convrot"]
    assert recipe_from_json(recipe_to_json(recipe)) == recipe and recipe.transforms == (ConvRot(),)
