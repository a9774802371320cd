"""The command line on a folder of diffusers: recorded calls in, a bundle and a folder out."""

import json

import pytest
import torch
from typer.testing import CliRunner

import fxq
from fxq.cli import app
from fxq.cli.options.models import AdapterError

diffusers = pytest.importorskip("diffusers")
CALL = {"hidden_states": (2, 16, 4), "encoder_hidden_states": (2, 16, 16), "encoder_attention_mask": (2, 16)}


def run(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 8, "cross_attention_dim": 16, "num_attention_heads": 2, "caption_channels": 16}
    model = diffusers.LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_layers=1, **sizes).eval()
    path = tmp_path_factory.mktemp("diffusers")
    model.save_pretrained(path / "model")
    with fxq.record(model) as calls, torch.no_grad():
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            inputs = {name: torch.randn(shape, generator=generator) for name, shape in CALL.items()}
            inputs["encoder_attention_mask"] = torch.ones(2, 16, dtype=torch.bool)
            steps = torch.tensor([400.0, 700.0])
            model(**inputs, timestep=steps, num_frames=2, height=2, width=4, return_dict=False)
    calls.save(path / "calls.safetensors")
    return path


@pytest.mark.parametrize("recipe", ["w8a8", pytest.param("w8a8-dynamic", marks=pytest.mark.sweep)])
def test_a_folder_with_recorded_calls_becomes_a_bundle_and_a_folder(folder, tmp_path, recipe):
    source = ["--model", "diffusers", "--checkpoint", folder / "model", "--calls", folder / "calls.safetensors"]
    words = ["quantize", *source, "--recipe", recipe, "--iterations", 3, "--out", tmp_path / "bundle"]
    told = json.loads(run(*words, "--json"))
    assert sum(layer["quantized"] for layer in told["layers"]) > 5 and told["output_sqnr_db"] > 20
    assert fxq.read_receipt(tmp_path / "bundle").metrics["output_sqnr_db"] == told["output_sqnr_db"]
    call = next(iter(fxq.Recording.load(folder / "calls.safetensors")))
    model = diffusers.LTXVideoTransformer3DModel.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        want, got = model(**call.kwargs)[0], fxq.load(tmp_path / "bundle")(**call.kwargs)[0]
    assert (want - got).norm() < 0.05 * want.norm()
    target = ["export", tmp_path / "bundle", "--target", "diffusers", "--out", tmp_path / "out"]
    with pytest.raises(fxq.BundleError, match="needs --source"):
        run(*target)
    run(*target, "--source", folder / "model", "--json")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fxq"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs a folder of save_pretrained"),
        (("--checkpoint", "x"), "needs recorded calls"),
        (("--checkpoint", "x", "--recipe", "w8a8-dynamic"), "needs one recorded call, to capture the graph"),
        (("--checkpoint", "x", "--calls", "y", "--lora", "z"), "and no other file"),
    ],
)
def test_what_is_missing_is_named(words, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        run("quantize", "--model", "diffusers", *words, "--out", tmp_path / "bundle")


def test_calls_are_for_diffusers_only(tmp_path):
    with pytest.raises(AdapterError, match="--calls is for --model diffusers"):
        run("quantize", "--model", "tiny", "--calls", "y", "--out", tmp_path / "bundle")
