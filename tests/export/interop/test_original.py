import pytest
import torch

import fxq
from fxq.export.interop.layers import InteropError, read_model
from fxq.export.interop.names import DIFFUSERS, ORIGINAL, Naming
from fxq.export.interop.original import with_originals
from tests.export.interop_toys import make_bundle, original_weights
from tests.toys import recipe, rows, toy


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return read_model(make_bundle(tmp_path_factory.mktemp("b") / "wan", 8))


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("style", [ORIGINAL, DIFFUSERS])
def test_weights_are_found_by_either_name(model, prefix, style):
    weights, naming = original_weights(), Naming(ORIGINAL)
    found = with_originals(model, {prefix + naming.rename(n, style): t.half() for n, t in weights.items()})
    for layer, stored in found.layers.items():
        assert stored.original.dtype == torch.float32
        assert torch.equal(stored.original, weights[f"{layer}.weight"].half().float())


def test_a_model_that_is_no_wan_has_its_own_names(tmp_path):
    path = fxq.save(fxq.quantize(toy(), [rows(9, 96)], recipe(4), progress=False), tmp_path / "b")
    found = with_originals(read_model(path), toy().state_dict())
    assert all(torch.equal(s.original, toy().state_dict()[f"{n}.weight"]) for n, s in found.layers.items())


def test_without_weights_nothing_changes(model):
    assert with_originals(model, None) is model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.0.ffn.0.weight"), r"lack 1 of 12 quantized layers: blocks.0.ffn.0"),
        (
            lambda w: w.update({"blocks.0.ffn.0.weight": torch.zeros(3, 5)}),
            r"ffn.0 is \[3, 5\], the bundle's \[96, 64\]",
        ),
        (
            lambda w: w["blocks.0.ffn.0.weight"].mul_(1.2),
            r"is not what was quantized: .* dB apart, expected at least 20",
        ),
        (lambda w: w["blocks.0.ffn.0.weight"].fill_(float("nan")), "is not what was quantized"),
    ],
)
def test_weights_of_another_model_are_refused_by_layer(model, change, message):
    weights = original_weights()
    change(weights)
    with pytest.raises(InteropError, match=message):
        with_originals(model, weights)
