import dataclasses

import pytest
import torch
from torch import nn

import fxq
from fxq.export import read_receipt
from fxq.export.interop import TARGETS, InteropError, Options, export_bundle
from fxq.export.interop.layers import read_model, round_per_channel, sqnr, to_single
from fxq.export.interop.names import DIFFUSERS, ORIGINAL, OWN, Naming
from tests.export.interop_toys import forms, make_bundle, original_weights, read_json
from tests.toys import recipe, rows, toy

X = rows(9, 96)


@pytest.fixture(scope="module", params=[4, 8])
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def bundle(bits, tmp_path_factory):
    return fxq.save(fxq.quantize(toy(), [X], recipe(bits), progress=False), tmp_path_factory.mktemp("b") / "toy")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("b") / "wan", 8)


def test_weights_come_back_in_the_models_channel_order(bundle, bits):
    model, original = read_model(bundle), toy()
    up = model.layers["blocks.0.up"]
    assert up.perm is not None and up.single_scale() is None and up.bits == bits
    for name, stored in model.layers.items():
        assert sqnr(original.get_submodule(name).weight.detach(), stored.weight()) > (10 if bits == 4 else 35)


def test_the_bias_comes_back_from_the_offset(bundle):
    for name, stored in read_model(bundle).layers.items():
        assert torch.allclose(stored.bias, toy().get_submodule(name).bias, atol=1e-6)


def test_a_layer_without_bias_gets_none(tmp_path):
    path = fxq.save(fxq.quantize(toy(bias=False), [X], recipe(8), progress=False), tmp_path / "b")
    assert all(stored.bias is None for stored in read_model(path).layers.values())


def test_the_rest_of_the_model_is_there_once(bundle):
    model = read_model(bundle)
    assert sorted(model.floats) == ["head.bias", "head.weight"] and model.kept == ("head",) and not model.constants


def test_constants_of_the_capture_are_left_out_and_named(tmp_path):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = toy()

        def forward(self, x):
            return self.inner(x) + torch.tensor([0.5] * 7)

    path = fxq.save(fxq.quantize(Shifted().eval(), [X], recipe(8), progress=False), tmp_path / "b")
    model = read_model(path)
    assert model.constants == ("lifted_tensor_0",) and {*model.floats} == {"inner.head.weight", "inner.head.bias"}
    report = export_bundle(path, "lightx2v", tmp_path / "out")
    assert any(note.startswith("constants of the captured graph are left out") for note in report.notes)


def test_one_scale_keeps_its_integers_and_costs_nothing(bundle):
    stored = read_model(bundle).layers["blocks.0.down"]
    integers, scale, record = to_single(stored, "down", torch.float32)
    assert torch.equal(integers, stored.integers) and torch.equal(scale[:, 0], stored.weight_scale[0])
    assert record.weight_sqnr_db is None and ("int4 in a byte" in record.note) == (stored.bits == 4)


@pytest.mark.parametrize(
    ("scheme", "note"), [({"bits": 6}, "int6 in a byte"), ({"bits": 4, "weight_group": 32}, "int4")]
)
def test_fewer_bits_than_a_byte_are_told_where_a_file_has_bytes(scheme, note, tmp_path):
    path = fxq.save(fxq.quantize(toy(), [X], recipe(dual_scale=False, **scheme), progress=False), tmp_path / "b")
    for target in ("vllm-omni", "comfy", "compressed-tensors"):
        report = export_bundle(path, target, tmp_path / target)
        made = [record for record in report.layers if record.form == "int8"]
        assert len(made) == 2 and all(record.note.startswith(note) and not record.weight_sqnr_db for record in made)


def test_two_scales_are_merged_at_a_stated_cost(bundle):
    stored = read_model(bundle).layers["blocks.0.up"]
    integers, scale, record = to_single(stored, "up", torch.float32)
    assert integers.dtype == torch.int8 and scale.shape == (64, 1)
    assert record.note.startswith("two scales merged into one per output channel")
    assert record.weight_sqnr_db == sqnr(stored.weight(), integers.float() * scale)
    assert 30 < record.weight_sqnr_db < 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_symmetric_and_within_half_a_step(dtype):
    weight = torch.cat((rows(5, 33), torch.zeros(1, 33)))
    integers, scale = round_per_channel(weight, dtype)
    assert int(integers.min()) >= -127 and scale.dtype == dtype
    assert bool(((integers * scale.float() - weight).abs() <= 0.51 * scale.float() + 0.01 * weight.abs()).all())


def test_sqnr_is_the_ratio_of_energies():
    assert sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == 20.0
    assert sqnr(torch.ones(2), torch.ones(2)) is None


WAN_NAMES = {
    "blocks.0.self_attn.q.weight": "blocks.0.attn1.to_q.weight",
    "blocks.11.self_attn.o": "blocks.11.attn1.to_out.0",
    "blocks.0.self_attn.norm_k.weight": "blocks.0.attn1.norm_k.weight",
    "blocks.0.cross_attn.v.bias": "blocks.0.attn2.to_v.bias",
    "blocks.0.cross_attn.k_img.bias": "blocks.0.attn2.add_k_proj.bias",
    "blocks.0.cross_attn.norm_k_img.weight": "blocks.0.attn2.norm_added_k.weight",
    "blocks.0.ffn.0.weight": "blocks.0.ffn.net.0.proj.weight",
    "blocks.0.ffn.2.weight": "blocks.0.ffn.net.2.weight",
    "blocks.0.norm3.weight": "blocks.0.norm2.weight",
    "blocks.0.modulation": "blocks.0.scale_shift_table",
    "head.modulation": "scale_shift_table",
    "head.head.weight": "proj_out.weight",
    "patch_embedding.weight": "patch_embedding.weight",
    "text_embedding.2.weight": "condition_embedder.text_embedder.linear_2.weight",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_of_wan_map_one_to_one(prefix):
    original = Naming.of([f"{prefix}head.head.weight", f"{prefix}blocks.0.self_attn.q.weight"])
    diffusers = Naming.of([f"{prefix}blocks.0.attn1.to_q.weight"])
    assert (original, diffusers) == (Naming(ORIGINAL, prefix), Naming(DIFFUSERS, prefix))
    for name, other in WAN_NAMES.items():
        assert original.rename(prefix + name, DIFFUSERS) == other and original.rename(prefix + name, ORIGINAL) == name
        assert diffusers.rename(prefix + other, ORIGINAL) == name


def test_names_of_other_models_stay():
    naming = Naming.of(["blocks.0.up.weight"])
    assert naming.style == OWN and naming.rename("blocks.0.ffn.0", DIFFUSERS) == "blocks.0.ffn.0"


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in ("comfy", "sglang")])
def test_four_bits_are_refused_where_the_target_has_none_and_widened_on_request(bundle, bits, tmp_path, target):
    if bits == 4:
        with pytest.raises(InteropError, match=r"2 layers have 4-bit weights \(blocks.0.up, blocks.0.down\).*w8a8"):
            export_bundle(bundle, target, tmp_path / "out")
        assert not list(tmp_path.iterdir())
    report = export_bundle(bundle, target, tmp_path / "out", Options(widen=bits == 4))
    assert {r.layer: r.form for r in report.layers} == {
        "head": "float",
        "blocks.0.up": "int8",
        "blocks.0.down": "int8",
    }


def needed(target):
    """Options without which a target refuses the small Wan."""
    return Options(original=original_weights()) if target == "sglang" else None


@pytest.mark.parametrize("target", TARGETS)
def test_every_export_has_a_report_and_a_receipt_that_name_the_bundle(wan, tmp_path, target):
    report = export_bundle(wan, target, tmp_path / "out", needed(target))
    stored = read_json(tmp_path / "out" / "fxq_report.json")
    assert stored["layers"] == [dataclasses.asdict(record) for record in report.layers] and stored["target"] == target
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted((*report.files, "fxq_report.json"))
    receipt = read_receipt(tmp_path / "out")
    digest = fxq.export.read_manifest(wan).files["model.safetensors"]
    assert receipt.source == report.source == digest and receipt.recipe["name"] == "w8a8"
    merged = {r.layer for r in report.layers if "two scales merged" in r.note}
    assert merged == (set() if target == "sglang" else {f"blocks.0.self_attn.{part}" for part in "qkv"})
    assert all(r.weight_sqnr_db > 30 for r in report.layers if r.layer in merged)


@pytest.mark.parametrize(
    "target", [t if t in ("comfy", "diffusers-torchao") else pytest.param(t, marks=pytest.mark.sweep) for t in TARGETS]
)
def test_two_exports_are_the_same_bytes_and_replace_each_other(wan, tmp_path, target):
    report = export_bundle(wan, target, tmp_path / "a", needed(target))
    before = {name: (tmp_path / "a" / name).read_bytes() for name in report.files}
    export_bundle(wan, target, tmp_path / "a", needed(target))
    assert {name: (tmp_path / "a" / name).read_bytes() for name in report.files} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_folder_with_other_content_is_left_alone(wan, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(fxq.BundleError, match=r"the folder has other content \(notes.md\)"):
        export_bundle(wan, "comfy", tmp_path)
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_an_unknown_target_is_refused(wan, tmp_path):
    with pytest.raises(InteropError, match="unknown target 'gguf': expected one of lightx2v, vllm-omni"):
        export_bundle(wan, "gguf", tmp_path / "out")


def test_a_damaged_bundle_is_refused_and_nothing_is_written(wan, tmp_path):
    with pytest.raises(fxq.BundleError, match="a bundle is a folder made by"):
        export_bundle(tmp_path / "absent", "comfy", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_floats_take_the_dtype_that_was_asked_for(wan, tmp_path):
    export_bundle(wan, "lightx2v", tmp_path / "out", Options(float_dtype=torch.bfloat16))
    found, _ = forms(tmp_path / "out" / "model.safetensors")
    floats = {dtype for name, (dtype, _) in found.items() if not name.endswith(("weight_scale",)) and dtype != "int8"}
    assert floats == {"bfloat16"} and found["model.blocks.0.ffn.0.weight_scale"][0] == "float32"


def test_a_bfloat16_model_keeps_its_biases_exactly(tmp_path):
    model = toy().to(torch.bfloat16)
    path = fxq.save(fxq.quantize(model, [X.bfloat16()], recipe(8), progress=False), tmp_path / "b")
    for name, stored in read_model(path).layers.items():
        assert stored.dtype == torch.bfloat16 and torch.equal(stored.bias, model.get_submodule(name).bias)
