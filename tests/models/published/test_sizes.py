import dataclasses

import pytest

from fxq.models.causal_wan import CausalWanConfig
from fxq.models.families import FAMILIES, with_settings
from fxq.models.loading import layout
from fxq.models.published.sizes import UNSEEN, sizes_of

CONFIGS = (
    CausalWanConfig.wan_1_3b(),
    CausalWanConfig.wan_14b(),
    CausalWanConfig(dim=24, num_heads=2, num_layers=1, in_dim=48, out_dim=16, patch_size=(1, 1, 3), qk_norm=False),
    CausalWanConfig(dim=24, num_heads=2, num_layers=2, cross_attn_norm=False),
)


@pytest.mark.parametrize("config", CONFIGS)
def test_shapes_show_every_size_but_the_number_of_heads(config):
    seen = sizes_of(layout(config))
    family = with_settings(FAMILIES["causal-wan"], seen | {UNSEEN: config.num_heads})
    assert family.config == config
    sizes = {field.name for field in dataclasses.fields(config)} - {UNSEEN, "eps", "text_len"}
    assert set(seen) == sizes


def test_other_tensors_show_nothing():
    assert sizes_of({"blocks.0.up.weight": (3, 3)}) == {} and sizes_of({}) == {}


def test_what_a_file_says_of_blocks_is_bounded_by_what_it_has():
    shapes = sizes_of(layout(CONFIGS[3]) | {"blocks.999999999.ffn.0.weight": (3, 3)})
    assert shapes["num_layers"] == 3
    without_pixels = layout(CONFIGS[3]) | {"patch_embedding.weight": (24, 16, 1, 0, 0)}
    assert sizes_of(without_pixels) == {} and sizes_of(layout(CONFIGS[3]) | {"blocks.0.ffn.0.weight": ()}) == {}
