"""A map on attention's results: its definition, the map of zeros, what is refused."""

import pytest
import torch

from fxq.kernels import absorb


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_each_group_of_channels_has_its_own_map(groups):
    x, found = normal(2, 5, 24), normal(2, groups, 24 // groups, 24 // groups, seed=1)
    for video in range(2):
        whole = torch.block_diag(*found[video])
        assert torch.allclose(absorb(x, found)[video], x[video] + x[video] @ whole, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_map_of_zeros_gives_the_same_bits(dtype):
    x = (normal(2, 5, 24) * 100).to(dtype)
    assert torch.equal(absorb(x, torch.zeros(2, 3, 8, 8)).view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize(
    ("x", "found", "message"),
    [
        (normal(2, 5, 24), normal(1, 1, 24, 24), r"expected float32 \[2, groups"),
        (normal(2, 5, 24), normal(2, 1, 24, 24).bfloat16(), "map is torch.bfloat16"),
        (normal(2, 5, 24), normal(2, 5, 8, 8), "5 groups of 8 channels are not the 24 of x"),
        (normal(5, 24), normal(2, 1, 24, 24), "x is torch.float32"),
        (normal(2, 5, 24).to(torch.int8), normal(2, 1, 24, 24), "x is torch.int8"),
    ],
)
def test_what_does_not_fit_is_refused(x, found, message):
    with pytest.raises(ValueError, match=message):
        absorb(x, found)
