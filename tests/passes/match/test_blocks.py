import pytest

from fxq.passes.match.blocks import block_of


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("blocks.3.ffn.0", "blocks.3"),
        ("model.blocks.12.self_attn.q", "model.blocks.12"),
        ("0.q", "0"),
        ("head", ""),
        ("blocks.3", ""),
        ("text_embedding.2", ""),
        ("", ""),
        ("layer2.q", ""),
    ],
)
def test_the_block_of_a_layer_is_the_first_numbered_module_around_it(layer, block):
    assert block_of(layer) == block
