import json

import pytest
import torch
from safetensors.torch import load_file

import fxq
from fxq.export.interop import InteropError, Options, export_bundle
from fxq.export.interop.layers import read_model, sqnr, to_single
from fxq.export.interop.rotation import quantize_rotated, rotate
from tests.export.interop_toys import forms, make_bundle, original_weights
from tests.toys import recipe, rows, toy


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("b") / "wan8", 8)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("b") / "wan4", 4)


def multiplied(tensors, name, x):
    """A layer as ComfyUI 0.33 with comfy-kitchen 0.2.40 computes it: the input rotated, rounded per token, times int8.

    Of ``int8_tensorwise``: rows of the rotated input are rounded by their largest magnitude over 127, the integers are
    multiplied, and the result is scaled by the token's and by the output's ``weight_scale``.
    """
    marker = json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist()))
    assert marker["format"] == "int8_tensorwise"
    if marker.get("convrot"):
        x = rotate(x, marker["convrot_groupsize"])
    scale = x.abs().amax(1, keepdim=True) / 127
    integers = (x / scale).round().clamp(-128, 127)
    product = integers @ tensors[f"{name}.weight"].float().t()
    return product * scale * tensors[f"{name}.weight_scale"].t() + tensors[f"{name}.bias"]


def layer_decibels(bundle, folder, want, **options):
    """dB of each layer's output against that of ``want``'s float weights."""
    report = export_bundle(bundle, "comfy", folder, Options(**options))
    tensors, found = load_file(folder / "model.safetensors"), {}
    for record in report.layers:
        if record.form != "float":
            weight, bias = want[f"{record.layer}.weight"], want[f"{record.layer}.bias"]
            x = rows(40, weight.shape[1])
            x[:, 5::23] *= 6
            exact = torch.nn.functional.linear(x, weight, bias)
            found[record.layer] = sqnr(exact, multiplied(tensors, record.name, x))
    return found


def test_rotated_int8_of_the_original_weight_is_better_than_merged_scales(eight, tmp_path):
    original = original_weights()
    merged = layer_decibels(eight, tmp_path / "merged", original)
    rotated = layer_decibels(eight, tmp_path / "rotated", original, original=original)
    assert len(rotated) == 12 and min(rotated.values()) > 35
    assert all(rotated[layer] > merged[layer] + 3 for layer in rotated)
    for record in export_bundle(eight, "comfy", tmp_path / "r", Options(original=original)).layers:
        if record.form != "float":
            assert record.form == "int8 rotated" and record.original_sqnr_db >= 40


def test_without_the_original_weights_one_scale_is_exact_and_two_are_merged_aloud(eight, tmp_path):
    report = export_bundle(eight, "comfy", tmp_path / "out")
    assert {r.note for r in report.layers if r.form == "int8" and r.weight_sqnr_db is None} == {""}
    assert any("3 layers had two scales" in note and "--original" in note for note in report.notes)
    assert all(record.original_sqnr_db is None for record in report.layers)


def test_four_bits_without_the_original_weights_are_refused_or_widened(four, tmp_path):
    with pytest.raises(InteropError, match=r"12 layers have 4-bit weights .* rounded a second time.*--original FILE"):
        export_bundle(four, "comfy", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = export_bundle(four, "comfy", tmp_path / "out", Options(widen=True))
    assert all("int4 in a byte" in record.note for record in report.layers if record.form != "float")


def test_the_header_says_which_models_are_causal(eight, tmp_path):
    def config(bundle, **options):
        report = export_bundle(bundle, "comfy", tmp_path / "out", Options(**options))
        return forms(tmp_path / "out" / "model.safetensors")[1].get("config"), " ".join(report.notes)

    causal = '{"transformer": {"causal_ar": true}}'
    found, notes = config(eight)
    assert found == causal and "heads of 128 channels; this model's have 32" in notes
    assert config(eight, causal=False)[0] is None
    other = fxq.save(fxq.quantize(toy(), [rows(9, 96)], recipe(8), progress=False), tmp_path / "toy")
    assert config(other)[0] is None and read_model(other).head_size is None
    assert config(other, causal=True)[0] == causal


def heavy():
    """Two linears of normal weights, every 37th input channel six times as large."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).eval()
    for layer in (model[0], model[2]):
        layer.weight.data = torch.randn_like(layer.weight) / 16
        layer.weight.data[:, ::37] *= 6
    return model.requires_grad_(False)


@pytest.mark.parametrize(("bits", "least"), [(8, 40), (4, 22.5)])
def test_rounding_once_onto_the_targets_grid_is_what_its_own_converter_does(bits, least, tmp_path):
    model = heavy()
    scheme = fxq.Scheme(weight_bits=bits, per_token=True)
    chosen = fxq.Recipe(name="plain", rules=(fxq.Rule("*", scheme),), methods=fxq.PRESETS["w8a8"].methods[:1])
    quantized = fxq.quantize(model, [torch.randn(64, 256)], chosen, progress=False)
    path = fxq.save(quantized, tmp_path / "b", fingerprint=False)
    weights = model.state_dict()
    report = export_bundle(path, "comfy", tmp_path / "once", Options(original=weights))
    once = {record.layer: record.original_sqnr_db for record in report.layers}
    stored = read_model(path).layers
    size = 256
    for layer, decibels in once.items():
        want = weights[f"{layer}.weight"]
        if bits == 8:
            integers, scale, _ = to_single(stored[layer], layer, torch.float32)
            before = sqnr(want, integers * scale)
        else:
            before = sqnr(want, quantize_rotated(stored[layer].weight(), size).weight())
        print(f"\n{bits} bits, layer {layer}: bundle {sqnr(want, stored[layer].weight())} dB, ", end="")
        print(f"rounded twice {before} dB, rounded once {decibels} dB")
        assert decibels >= least and decibels > before + 3


@pytest.mark.parametrize("target", ["comfy", "sglang"])
def test_a_bundle_that_is_rotated_so_keeps_its_integers(target, tmp_path):
    model, x = heavy(), torch.randn(64, 256)
    quantized = fxq.quantize(model, [x], "w8a8-single-convrot", progress=False)
    path = fxq.save(quantized, tmp_path / "b", fingerprint=False)
    report = export_bundle(path, target, tmp_path / "out")
    assert [(r.form, r.weight_sqnr_db, r.note) for r in report.layers] == [("int8 rotated", None, "")] * 2
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    assert not [name for name in tensors if "rotation" in name]
    h = multiplied(tensors, "2", torch.nn.functional.gelu(multiplied(tensors, "0", x)))
    assert sqnr(quantized(x), h) > 50 and sqnr(model(x), h) > 38
    with pytest.raises(InteropError, match="the targets comfy and sglang rotate as ConvRot does"):
        export_bundle(path, "vllm-omni", tmp_path / "other")


def test_a_bundle_of_one_scale_keeps_its_integers_everywhere(tmp_path):
    model, x = heavy(), torch.randn(64, 256)
    path = fxq.save(fxq.quantize(model, [x], "w8a8-single", progress=False), tmp_path / "b", fingerprint=False)
    for target in ("comfy", "vllm-omni", "lightx2v", "compressed-tensors", "diffusers-torchao"):
        report = export_bundle(path, target, tmp_path / target)
        assert [record.weight_sqnr_db for record in report.layers] == [None, None]
        assert not [note for note in report.notes if "two scales" in note]
        assert report.activations.endswith("as in the bundle")
