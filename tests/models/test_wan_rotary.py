"""Keys of a cache are rotated to any place, and back."""

import pytest
import torch

from fxq.models.causal_wan import apply_rope, rope_tables
from fxq.models.wan_rotary import WanRotary

ROTARY = WanRotary(12, 2, 3)


@pytest.mark.parametrize("first", [0, 5, 4000])
def test_keys_are_rotated_as_the_model_rotates_them(first):
    x = torch.randn(2, 4 * ROTARY.tokens, 3, 12)
    assert torch.equal(ROTARY(x, first), apply_rope(x, *rope_tables(12, 4, 2, 3, first)))
    assert torch.allclose(ROTARY(ROTARY(x, first), first, inverse=True), x, atol=1e-6)


def test_attention_sees_distances_alone():
    q, k = (torch.randn(1, ROTARY.tokens, 1, 12) for _ in range(2))

    def scores(shift):
        return ROTARY(q, 7 + shift)[0, :, 0] @ ROTARY(k, 2 + shift)[0, :, 0].T

    assert torch.allclose(scores(0), scores(300), atol=1e-4)
