import json

import pytest
import torch
from safetensors import safe_open

import fxq
from fxq.export.interop import InteropError, Options, export_bundle
from fxq.export.interop.layers import read_model, sqnr
from fxq.export.interop.names import DIFFUSERS
from tests.export.interop_toys import WAN_CONFIG, make_bundle, original_weights, read_json
from tests.export.test_interop_targets import decode
from tests.toys import recipe, rows

FORMS = {"int8_tensorwise": {"weight", "weight_scale"}}
FORMS["asym_w4a8_int8"] = {"weight", "weight_s_rel", "weight_s_channel", "weight_codebook"}


def read(file):
    """Markers and tensors as SGLang 0.5.23 takes them (``inspect_comfy_quant_markers``, ``ConvRotInt8Config``).

    Every int8 weight has a marker, the header's and the tensor's agree, all are of one format and say ``convrot``: a
    plain int8 marker is taken for an embedding's. Group sizes are 16, 64 or 256 and divide the width.
    """
    with safe_open(file, "pt") as content:
        header = json.loads(content.metadata()["_quantization_metadata"])["layers"]
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  # it is no mapping
    marked = {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    assert marked == set(header)
    for name, marker in header.items():
        assert json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist())) == marker
        assert marker["convrot"] is True and marker["convrot_groupsize"] in (16, 64, 256)
        assert {f"{name}.{leaf}" for leaf in FORMS[marker["format"]]} <= set(tensors)
    assert len({marker["format"] for marker in header.values()}) == 1
    return header, tensors


def weight_of(name, marker, tensors):
    size = marker["convrot_groupsize"]
    if marker["format"] == "asym_w4a8_int8":
        return decode(tensors, name, size)
    assert tensors[f"{name}.weight_scale"].shape == (len(tensors[f"{name}.weight"]), 1)
    h4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    h = h4
    while len(h) < size:
        h = torch.kron(h, h4)
    rotated = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
    return torch.cat([part @ h for part in rotated.split(size, dim=1)], dim=1)


@pytest.mark.parametrize(("bits", "least"), [(8, 40), (4, 20)])
def test_its_own_rules_read_the_blocks_and_leave_the_rest_in_floats(bits, least, tmp_path):
    bundle, original = make_bundle(tmp_path / "b", bits), original_weights()
    report = export_bundle(bundle, "sglang", tmp_path / "out", Options(original=original, base_config=WAN_CONFIG))
    header, tensors = read(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    model = read_model(bundle)
    assert len(header) == 10
    for layer in model.layers:
        name, want = model.naming.rename(layer, DIFFUSERS), original[f"{layer}.weight"]
        if name in header:
            assert sqnr(want, weight_of(name, header[name], tensors)) > least
        else:
            assert torch.equal(tensors[f"{name}.weight"], want)
    assert read_json(tmp_path / "out" / "config.json") == WAN_CONFIG
    assert any("its quantization convrot_int8" in note for note in report.notes)


def bundle_of(path, bits, widths=(64, 64), **layers):
    model = torch.nn.Sequential(*(torch.nn.Linear(width, widths[0]) for width in widths)).eval()
    schemes = [fxq.Rule(name.strip("_"), fxq.Scheme(weight_bits=b)) for name, b in layers.items()]
    chosen = fxq.Recipe(name="a", rules=(*schemes, *recipe(bits).rules), methods=recipe(bits).methods)
    data = [rows(9, widths[0])]
    return model, fxq.save(fxq.quantize(model, data, chosen, progress=False), path, fingerprint=False)


def test_what_it_cannot_hold_is_refused(tmp_path):
    model, plain = bundle_of(tmp_path / "a", 8)
    with pytest.raises(InteropError, match=r"2 layers of the bundle are not rotated \(0, 1\): give the weights"):
        export_bundle(plain, "sglang", tmp_path / "out")
    model, mixed = bundle_of(tmp_path / "b", 8, _0=4)
    with pytest.raises(InteropError, match=r"one width per file, the bundle has 4 bits: 0; 8 bits: 1"):
        export_bundle(mixed, "sglang", tmp_path / "out", Options(original=model.state_dict()))
    model, odd = bundle_of(tmp_path / "c", 8, (40, 40))
    with pytest.raises(InteropError, match=r"width of 2 layers not \(0, 1\): keep them by a rule"):
        export_bundle(odd, "sglang", tmp_path / "out", Options(original=model.state_dict()))
    assert not (tmp_path / "out").exists()
