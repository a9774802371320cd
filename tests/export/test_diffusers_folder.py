import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fxq
from fxq.export.diffusers_folder import CONFIG, WEIGHTS, QuantizationConfig, save_diffusers
from fxq.models.diffusers_folder import load_folder
from tests.toys import recipe, toy

diffusers = pytest.importorskip("diffusers")
from fxq.integrations.diffusers import register  # noqa: E402
from fxq.integrations.swap import QuantizedLinear, apply  # noqa: E402

SIZES = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 1,
    "rope_max_seq_len": 16,
}


def make_model(**options):
    torch.manual_seed(5)
    model = diffusers.WanTransformer3DModel(**SIZES, **options).eval().requires_grad_(False)
    for name in ("to_q", "to_k", "to_v"):
        getattr(model.blocks[0].attn1, name).weight[:, 5:69:2] *= 6
    return model


def call(seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 3, 3, 4, 6, generator=generator).to(dtype),
        "timestep": torch.randint(0, 1000, (2,), generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator).to(dtype),
        "return_dict": False,
    }


def quantize(model, bits=8, dtype=torch.float32, **scheme):
    return fxq.quantize(model, [call(seed, dtype) for seed in range(2)], recipe(bits, **scheme), progress=False)


@pytest.fixture(scope="module")
def pair():
    model = make_model()
    return model, quantize(model)


@pytest.fixture
def folder(pair, tmp_path):
    return save_diffusers(pair[1], pair[0], tmp_path / "folder")


def read_back(folder, **options):
    pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate only")
    register()
    return diffusers.WanTransformer3DModel.from_pretrained(folder, **options)


def configuration(folder):
    return json.loads((folder / CONFIG).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    [{}, {"per_token": True}, {"per_token": True, "asymmetric": True}],
    ids=["static", "per token", "asymmetric"],
)
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        pytest.param(8, torch.float32, marks=pytest.mark.sweep),
        (4, torch.bfloat16),
        pytest.param(8, torch.bfloat16, marks=pytest.mark.sweep),
        pytest.param(4, torch.float32, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_from_pretrained_computes_what_the_quantized_graph_does(bits, dtype, scheme, tmp_path):
    make_model().save_pretrained(tmp_path / "original")
    model = load_folder(tmp_path / "original", dtype)
    quantized = quantize(model, bits, dtype, **scheme)
    assert quantized(**call(9, dtype))[0].dtype == dtype
    reloaded = read_back(save_diffusers(quantized, model, tmp_path / "folder"))
    assert type(reloaded) is type(model)
    assert torch.equal(reloaded(**call(9, dtype))[0], quantized(**call(9, dtype))[0])
    assert not torch.equal(reloaded(**call(9, dtype))[0], model(**call(9, dtype))[0])


def test_a_layer_read_back_has_its_plan_and_its_tensors(pair, folder):
    layer = read_back(folder).blocks[0].attn1.to_q
    assert isinstance(layer, QuantizedLinear)
    assert len(layer.plan.outliers) == 32
    assert set(layer.plan.outliers) == set(range(5, 69, 2))
    assert layer.plan.scheme.label == "W8A8"
    assert (
        layer.plan.output_sqnr
        == configuration(folder)["quantization_config"]["layers"][layer.plan.layer]["output_sqnr"]
    )
    assert torch.equal(layer.integers, pair[1].get_buffer("blocks.0.attn1.to_q.weight"))


def test_the_folder_has_one_file_of_integers_and_says_how_it_was_made(pair, folder):
    assert {file.name for file in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    config = configuration(folder)
    assert config["_class_name"] == "WanTransformer3DModel"
    assert config["quantization_config"]["quant_method"] == "fxq"
    assert config["quantization_config"]["kept"]["proj_out"] == "prediction head: tiny and sensitive"
    tensors = load_file(folder / WEIGHTS)
    assert tensors["blocks.0.ffn.net.0.proj.weight"].dtype == torch.int8
    assert "blocks.0.ffn.net.0.proj.bias" not in tensors
    assert torch.equal(tensors["proj_out.weight"], pair[0].proj_out.weight)
    assert fxq.read_receipt(folder).recipe["name"] == "w8a8"


@pytest.mark.parametrize("shard", ["10GB", "30KB"], ids=["one file", "shards"])
def test_save_pretrained_of_the_model_read_back_writes_the_same_again(folder, tmp_path, shard):
    reloaded = read_back(folder)
    reloaded.save_pretrained(tmp_path / "again", max_shard_size=shard)
    ours, theirs = configuration(folder), configuration(tmp_path / "again")
    theirs.pop("_name_or_path")
    assert theirs == ours
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "30KB")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    torch.testing.assert_close(tensors, load_file(folder / WEIGHTS), rtol=0, atol=0)
    assert fxq.read_receipt(tmp_path / "again") == fxq.read_receipt(folder)
    assert torch.equal(read_back(tmp_path / "again")(**call())[0], reloaded(**call())[0])


def test_a_pickle_is_neither_written_nor_read(folder, tmp_path):
    reloaded = read_back(folder)
    with pytest.raises(fxq.BundleError, match="saved as safetensors only"):
        reloaded.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(fxq.BundleError, match=r"\.bin: expected safetensors only"):
        read_back(folder)


def test_torch_dtype_casts_what_is_kept_and_no_scale(pair, folder):
    reloaded = read_back(folder, torch_dtype=torch.bfloat16)
    assert reloaded.dtype == torch.bfloat16
    assert reloaded.patch_embedding.weight.dtype == torch.bfloat16
    assert reloaded.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    layer = reloaded.blocks[0].attn1.to_q
    assert torch.equal(layer.weight_scale, pair[1].get_buffer("blocks.0.attn1.to_q.weight_scale"))
    got, want = reloaded(**call(3, torch.bfloat16))[0], pair[1](**call(3))[0]
    assert got.dtype == torch.bfloat16
    assert ((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_a_device_map_places_the_integers(pair, folder, place):
    reloaded = read_back(folder, device_map=place, torch_dtype=torch.float32)
    assert torch.equal(reloaded(**call(3))[0], pair[1](**call(3))[0])


def test_the_automatic_class_finds_the_same_model(pair, folder):
    read_back(folder)
    assert torch.equal(diffusers.AutoModel.from_pretrained(str(folder))(**call(3))[0], pair[1](**call(3))[0])


PROGRAM = """
import sys, torch, diffusers
from safetensors.torch import load_file, save_file
from fxq.integrations.diffusers import register
register()
model = diffusers.WanTransformer3DModel.from_pretrained(sys.argv[1])
save_file({"out": model(**load_file(sys.argv[2]), return_dict=False)[0]}, sys.argv[3])
"""


@pytest.mark.sweep
def test_a_fresh_process_gets_the_same_output(pair, folder, tmp_path):
    pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate only")
    save_file({n: v for n, v in call(4).items() if n != "return_dict"}, tmp_path / "in.safetensors")
    command = [sys.executable, "-c", PROGRAM, folder, tmp_path / "in.safetensors", tmp_path / "out.safetensors"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out.safetensors")["out"], pair[1](**call(4))[0])


def test_without_register_diffusers_names_the_method_it_lacks(folder, monkeypatch):
    pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate only")
    for mapping in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        known = getattr(diffusers.quantizers.auto, mapping)
        monkeypatch.setattr(diffusers.quantizers.auto, mapping, {k: v for k, v in known.items() if k != "fxq"})
    with pytest.raises(ValueError, match="Unknown quantization type, got fxq"):
        diffusers.WanTransformer3DModel.from_pretrained(folder)


def test_a_bundle_on_disk_and_a_mapped_model_write_the_same_folder(pair, folder, tmp_path):
    bundle = fxq.save(pair[1], tmp_path / "bundle", fingerprint=False)
    pair[0].save_pretrained(tmp_path / "original")
    other = save_diffusers(bundle, load_folder(tmp_path / "original"), tmp_path / "other")
    for name in (CONFIG, WEIGHTS):
        assert (other / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_what_the_captured_call_does_not_use_comes_from_the_model(tmp_path):
    model = make_model(image_dim=20)
    quantized = quantize(model)
    folder = save_diffusers(quantized, model, tmp_path / "folder")
    tensors, kept = load_file(folder / WEIGHTS), configuration(folder)["quantization_config"]["kept"]
    unused = "condition_embedder.image_embedder.ff.net.0.proj"
    assert torch.equal(tensors[f"{unused}.weight"], model.get_parameter(f"{unused}.weight"))
    assert kept[unused] == "the captured call does not use it"
    assert torch.equal(read_back(folder)(**call())[0], quantized(**call())[0])


def test_linears_of_other_classes_are_quantized_in_their_place(tmp_path):
    torch.manual_seed(2)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 2, "num_layers": 1, "sample_size": 4}
    model = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=5).eval()
    x = {
        "hidden_states": torch.randn(2, 2, 4, 4),
        "timestep": torch.tensor([3, 8]),
        "class_labels": torch.tensor([1, 4]),
    }
    quantized = fxq.quantize(model, [{**x, "return_dict": False}], recipe(), progress=False)
    folder = save_diffusers(quantized, model, tmp_path / "folder")
    pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate only")
    register()
    reloaded = diffusers.DiTTransformer2DModel.from_pretrained(folder)
    assert sum(isinstance(m, QuantizedLinear) for m in reloaded.modules()) == len(
        configuration(folder)["quantization_config"]["layers"]
    )
    assert torch.equal(reloaded(**x).sample, quantized(**x, return_dict=False)[0])


def test_a_pipeline_runs_with_swapped_linears_and_with_the_folder(tmp_path):
    torch.manual_seed(2)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    model = diffusers.DiTTransformer2DModel(**sizes, sample_size=4).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=4).eval()
    pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe([3, 1], num_inference_steps=2, generator=generator, output_type="np").images

    with fxq.record(model) as calls:
        floats = draw(pipe)
    quantized = fxq.quantize(model, calls, recipe(), progress=False)
    pipe.transformer = apply(model, quantized)
    swapped = draw(pipe)
    assert 0 < abs(swapped - floats).max() < 0.1
    pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate only")
    pipe.transformer = model
    pipe.save_pretrained(tmp_path / "pipe")
    save_diffusers(quantized, model, tmp_path / "pipe" / "transformer")
    register()
    reloaded = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(reloaded.transformer.transformer_blocks[0].attn1.to_q, QuantizedLinear)
    reloaded.set_progress_bar_config(disable=True)
    assert abs(draw(reloaded) - swapped).max() < 1e-6


def other_values(model):
    model.blocks[0].attn1.to_q.weight.copy_(torch.randn(96, 96))


def other_shape(model):
    model.blocks[0].ffn.net[2] = nn.Linear(32, 96)


def other_class(model):
    class Own(nn.Linear):
        pass

    model.blocks[0].attn2.to_q = Own(96, 96)


def tie(model):
    model.blocks[0].attn1.to_v.weight = model.blocks[0].attn1.to_k.weight


def beside(model):
    model.blocks[0].attn1.to_q.register_buffer("extra", torch.ones(1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_values, r"attn1\.to_q: the model's weight is .* steps from the integers"),
        (other_shape, r"ffn\.net\.2 is \(96, 64\), the model's weight \(96, 32\)"),
        (other_class, r"attn2\.to_q is no nn\.Linear of the model"),
        (beside, r"attn1\.to_q has a tensor extra beside weight and bias"),
        (tie, r"attn1\.to_v\.weight and .*attn1\.to_k\.weight are one parameter"),
    ],
)
def test_a_model_that_was_not_quantized_is_refused_and_nothing_is_written(pair, tmp_path, change, reason):
    model = copy.deepcopy(pair[0])
    change(model)
    with pytest.raises(fxq.BundleError, match=reason):
        save_diffusers(pair[1], model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


class Reading(nn.Module):
    """Uses the parameters of a linear without calling it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return nn.functional.linear(x, self.linear.weight, self.linear.bias)


def test_a_linear_that_is_read_but_never_called_is_refused(tmp_path):
    model = make_model()
    model.blocks[0].ffn.net[2] = Reading(model.blocks[0].ffn.net[2])
    with pytest.raises(fxq.BundleError, match=r"ffn\.net\.2\.linear is never called, blocks\.0\.ffn\.net\.2 reads its"):
        save_diffusers(quantize(model), model, tmp_path / "folder")


def test_modules_without_a_configuration_or_without_facts_are_refused(pair, tmp_path):
    with pytest.raises(fxq.BundleError, match="the model is Toy, expected one of diffusers"):
        save_diffusers(pair[1], toy(), tmp_path / "folder")
    with pytest.raises(fxq.BundleError, match=r"not made by fxq\.quantize"):
        save_diffusers(torch.fx.symbolic_trace(nn.Linear(2, 2)), pair[0], tmp_path / "folder")


def test_an_optimized_module_is_refused(pair, tmp_path):
    with pytest.raises(fxq.BundleError, match="optimized for this machine; give the one it was made from"):
        save_diffusers(fxq.optimize(pair[1]), pair[0], tmp_path / "folder")


def test_a_folder_with_other_content_stays(pair, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(fxq.BundleError, match=r"other content \(notes\.txt\)"):
        save_diffusers(pair[1], pair[0], tmp_path)


def test_a_folder_that_is_quantized_is_no_model_to_quantize(folder):
    with pytest.raises(fxq.CheckpointError, match=r"quantized already, by 'fxq'"):
        load_folder(folder)


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def change_config(folder, change):
    config = configuration(folder)
    change(config["quantization_config"])
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        (change_tensors, lambda t: t.pop("blocks.0.attn1.to_q.offset"), r"lacks 1 tensors.*attn1\.to_q\.offset"),
        (change_tensors, lambda t: t.pop("proj_out.bias"), r"lacks 1 tensors of the model: proj_out\.bias"),
        (
            change_tensors,
            lambda t: t.update({"blocks.0.attn1.to_q.offset": torch.zeros(95)}),
            r"to_q\.offset has shape \[95\], expected \[96\]",
        ),
        (
            change_tensors,
            lambda t: t.update({"blocks.0.attn1.to_q.weight_scale": t["blocks.0.attn1.to_q.weight_scale"].half()}),
            r"to_q\.weight_scale is torch\.float16, expected torch\.float32",
        ),
        (change_config, lambda q: q.update(format_version=7), r"version 7, this fxq reads 1; load it with .* \(0\.1"),
        (change_config, lambda q: q.pop("receipt"), r"quantization_config: receipt: Field required"),
        (
            change_config,
            lambda q: q["layers"]["blocks.0.attn1.to_q"].update(in_features=64),
            r"attn1\.to_q of quantization_config is no nn\.Linear of 64 inputs and 96 outputs",
        ),
        (
            change_config,
            lambda q: q["layers"]["blocks.0.attn1.to_q"].update(in_features=32),
            r"layers\.blocks\.0\.attn1\.to_q: 32 outliers of 32 inputs; the folder is damaged",
        ),
        (
            change_config,
            lambda q: q["layers"].update(nothing=q["layers"]["blocks.0.attn1.to_q"]),
            r"layer nothing of quantization_config is no nn\.Linear",
        ),
    ],
    ids=["no offset", "no bias", "shape", "dtype", "version", "receipt", "sizes", "outliers", "layer"],
)
def test_a_damaged_folder_is_refused_with_the_place(folder, part, change, reason):
    part(folder, change)
    with pytest.raises(fxq.BundleError, match=reason):
        read_back(folder)


def test_the_configuration_survives_json(folder):
    data = configuration(folder)["quantization_config"]
    assert QuantizationConfig.from_json(data).to_json() == data


def test_registering_twice_changes_nothing():
    register()
    before = dict(diffusers.quantizers.auto.AUTO_QUANTIZER_MAPPING)
    register()
    after = dict(diffusers.quantizers.auto.AUTO_QUANTIZER_MAPPING)
    assert after == before
    assert "fxq" in after
