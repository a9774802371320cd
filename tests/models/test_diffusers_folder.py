import json
import pathlib
import shutil
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fxq.models.checkpoints import CheckpointError
from fxq.models.diffusers_folder import load_folder

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 1,
    "rope_max_seq_len": 16,
}


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(5)
    return diffusers.WanTransformer3DModel(**CONFIG).eval().requires_grad_(False)


@pytest.fixture
def folder(original, tmp_path):
    original.save_pretrained(tmp_path / "wan")
    return tmp_path / "wan"


def call(dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(1, 3, 3, 4, 6, generator=generator).to(dtype),
        "timestep": torch.tensor([417]),
        "encoder_hidden_states": torch.randn(1, 5, 20, generator=generator).to(dtype),
        "return_dict": False,
    }


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)


def reconfigure(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def assert_same(got, want):
    torch.testing.assert_close(got.state_dict(), want.state_dict(), rtol=0, atol=0)
    # Equal weights at another alignment in memory may take another path through the CPU's GEMM.
    torch.testing.assert_close(got(**call())[0], want(**call())[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shard", ["1GB", "12KB"], ids=["one file", "shards"])
def test_a_folder_gives_the_model_that_was_saved(original, tmp_path, shard):
    original.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "12KB")
    model = load_folder(tmp_path)
    assert type(model) is type(original)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert_same(model, original)


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="no /proc/self/maps on this system")
def test_the_weights_lie_in_the_mapped_file(folder):
    model = load_folder(folder)
    lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(folder / WEIGHTS))]
    mapped = [(int(low, 16), int(high, 16)) for low, high in ranges]
    for name, tensor in model.state_dict().items():
        assert any(low <= tensor.data_ptr() < high for low, high in mapped), name


def test_a_dtype_is_applied_as_from_pretrained_does(folder):
    pytest.importorskip("accelerate")
    want = diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    got = load_folder(folder, torch.bfloat16)
    assert {n: t.dtype for n, t in got.state_dict().items()} == {n: t.dtype for n, t in want.state_dict().items()}
    assert got.dtype == torch.bfloat16
    assert torch.equal(got(**call(torch.bfloat16))[0], want(**call(torch.bfloat16))[0])


def test_what_the_class_keeps_in_float32_is_float32_whatever_the_file_has(original, folder):
    rewrite(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    dtypes = {name: t.dtype for name, t in load_folder(folder).state_dict().items()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32


def test_an_old_configuration_of_a_common_class_gives_the_class_of_today(tmp_path):
    torch.manual_seed(1)
    small = {"num_attention_heads": 2, "attention_head_dim": 6, "in_channels": 2, "num_layers": 1, "sample_size": 4}
    model = diffusers.DiTTransformer2DModel(**small, num_embeds_ada_norm=5).eval()
    model.save_pretrained(tmp_path)
    reconfigure(tmp_path, _class_name="Transformer2DModel")
    assert type(load_folder(tmp_path)) is diffusers.DiTTransformer2DModel


def make_pipeline(folder, components):
    folder.parent.mkdir(exist_ok=True)
    index = {"_class_name": "WanPipeline", **{name: ["diffusers", "WanTransformer3DModel"] for name in components}}
    root = folder.parent / "pipeline"
    root.mkdir()
    (root / "model_index.json").write_text(json.dumps(index))
    for name in components:
        shutil.copytree(folder, root / name)
    return root


def test_a_pipeline_folder_means_its_transformer(original, folder):
    root = make_pipeline(folder, ["transformer", "transformer_2"])
    rewrite(root / "transformer_2", lambda tensors: tensors["proj_out.bias"].add_(1))
    assert torch.equal(load_folder(root).proj_out.bias, original.proj_out.bias)
    assert torch.equal(load_folder(root, subfolder="transformer_2").proj_out.bias, original.proj_out.bias + 1)


def test_a_pipeline_without_a_transformer_names_its_components(folder):
    root = make_pipeline(folder, ["prior", "unet"])
    with pytest.raises(CheckpointError, match=r"transformer has no config.json; name a subfolder: prior, unet"):
        load_folder(root)


def test_other_threads_build_their_modules_as_usual(folder, monkeypatch):
    built = []
    cls = diffusers.WanTransformer3DModel
    from_config = cls.from_config.__func__

    def building(kind, config):
        thread = threading.Thread(target=lambda: built.append(nn.Linear(3, 2)))
        thread.start()
        thread.join()
        return from_config(kind, config)

    monkeypatch.setattr(cls, "from_config", classmethod(building))
    load_folder(folder)
    assert built[0].weight.device.type == "cpu"
    assert nn.Linear(3, 2).weight.device.type == "cpu"


def drop_two(tensors):
    del tensors["proj_out.bias"], tensors["blocks.0.attn2.to_k.weight"]


def add_one(tensors):
    tensors["blocks.0.attn3.to_k.weight"] = torch.zeros(2)


def reshape_one(tensors):
    tensors["proj_out.bias"] = torch.zeros(5)


def make_integer(tensors):
    tensors["proj_out.bias"] = torch.zeros(12, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_one, r"unexpected: blocks\.\[0\]\.attn3\.to_k\.weight"),
        (reshape_one, r"of another shape: proj_out\.bias is \[5\], expected \[12\]"),
        (make_integer, r"proj_out\.bias is I8, .*quantized already cannot be quantized again"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(folder, change, reason):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=reason):
        load_folder(folder)


def test_every_missing_tensor_is_named(folder):
    rewrite(folder, drop_two)
    with pytest.raises(CheckpointError) as error:
        load_folder(folder)
    assert "proj_out.bias" in str(error.value)
    assert "attn2.to_k.weight" in str(error.value)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"_class_name": "WanTransformer4DModel"}, r"no model class of diffusers .*close names: WanTransformer3DModel"),
        ({"_class_name": "WanPipeline", "_diffusers_version": "9.9"}, r"wrote the folder \(9\.9\)"),
        ({"_class_name": None}, r"names no _class_name"),
        ({"quantization_config": {"quant_method": "torchao"}}, r"quantized already, by 'torchao'.*it was made from"),
        ({"quantization_config": {"quant_method": "fxq"}}, r"by 'fxq'.*fxq\.register\(\)"),
    ],
    ids=["unknown class", "no model", "no class", "torchao", "fxq"],
)
def test_a_configuration_that_is_not_of_a_float_model_is_refused(folder, values, reason):
    reconfigure(folder, **values)
    with pytest.raises(CheckpointError, match=reason):
        load_folder(folder)


def test_pickles_are_refused_and_not_opened(original, folder):
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=r"holds only diffusion_pytorch_model\.bin: reading a pickle could run"):
        load_folder(folder)
    assert not list(folder.glob("pwned"))


def test_a_second_precision_in_the_folder_does_not_confuse(original, folder):
    shutil.copy(folder / WEIGHTS, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert_same(load_folder(folder), original)
    (folder / WEIGHTS).unlink()
    assert_same(load_folder(folder), original)


def test_a_damaged_configuration_or_no_folder_is_an_error(folder, tmp_path):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_folder(folder)
    with pytest.raises(CheckpointError, match="is no folder"):
        load_folder(tmp_path / "nothing")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json; expected a save_pretrained folder"):
        load_folder(folder)


def test_without_diffusers_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'fxq\[wan\]'"):
        load_folder(folder)
