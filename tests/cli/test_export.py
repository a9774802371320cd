import json
from typing import get_type_hints

import pytest
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fxq
from fxq.cli import export as cli_export
from fxq.export.interop import TARGETS
from fxq.export.onnx import check_onnx
from tests.toys import recipe, rows, toy

app = typer.Typer()
app.command()(cli_export.export)
app.command()(cli_export.verify)


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    module = fxq.quantize(toy(), [rows(5, 96)], recipe(8), progress=False)
    return fxq.save(module, tmp_path_factory.mktemp("b") / "toy")


def test_verify_prints_the_kernel_of_every_layer_and_exits_zero(bundle):
    done = invoke("verify", bundle)
    assert done.exit_code == 0 and "blocks.0.up" in done.output and "passed" in done.output
    layers = json.loads(invoke("verify", bundle, "--json").output)["layers"]
    assert [item["layer"] for item in layers] == ["blocks.0.up", "blocks.0.down"] and layers[0]["linear_kernel"]


def test_verify_exits_one_on_a_fallback_and_on_damage(bundle, tmp_path, monkeypatch):
    assert invoke("verify", tmp_path).exit_code == 1
    monkeypatch.setattr("fxq.kernels.used", lambda *args: "reference")
    done = invoke("verify", bundle, "--json")
    assert done.exit_code == 1 and json.loads(done.output)["ok"] is False


def test_export_prints_the_cost_of_merged_scales(bundle, tmp_path):
    done = invoke("export", bundle, "--target", "vllm-omni", "--out", tmp_path / "out")
    assert done.exit_code == 0 and "two scales merged into one per output channel" in done.output
    stored = json.loads((tmp_path / "out" / "fxq_report.json").read_text())
    costs = {layer["layer"]: layer["weight_sqnr_db"] for layer in stored["layers"]}
    assert f"{costs['blocks.0.up']:.1f}" in done.output and "exact" in done.output
    again = invoke("export", bundle, "--target", "vllm-omni", "--out", tmp_path / "out", "--json")
    assert json.loads(again.output) == stored


def test_the_models_config_is_completed(bundle, tmp_path):
    (tmp_path / "config.json").write_text('{"num_layers": 30}')
    options = ("--target", "diffusers-torchao", "--out", tmp_path / "out", "--base-config", tmp_path / "config.json")
    assert invoke("export", bundle, *options).exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_layers"] == 30 and config["quantization_config"]["quant_method"] == "torchao"


@pytest.mark.parametrize(("text", "message"), [("[1]", "expected a JSON object"), ("{", "cannot be read as")])
def test_a_config_that_is_none_is_refused(bundle, tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    options = ("--target", "vllm-omni", "--out", tmp_path / "out", "--base-config", tmp_path / "config.json")
    done = invoke("export", bundle, *options)
    assert isinstance(done.exception, fxq.BundleError) and message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_is_wrong_usage(bundle, tmp_path):
    assert invoke("export", bundle, "--target", "gguf", "--out", tmp_path / "out").exit_code == 2


@pytest.mark.parametrize(("option", "kind", "cpus"), [("--vnni", 3, "CPUs with VNNI"), ("--no-vnni", 2, "every CPU")])
def test_an_onnx_file_is_written_for_either_kind_of_cpu(bundle, tmp_path, option, kind, cpus):
    onnx = pytest.importorskip("onnx")
    file = tmp_path / "toy.onnx"
    done = invoke("export", bundle, "--target", "onnx", "--out", file, option)
    assert done.exit_code == 0 and f"for ONNX Runtime and OpenVINO on {cpus}" in " ".join(done.output.split())
    weights = {t.name: t.data_type for t in onnx.load(file).graph.initializer}
    assert weights["blocks.0.down.weight"] == kind  # 2: uint8, 3: int8


def test_the_kind_of_cpu_is_for_onnx_only(bundle, tmp_path):
    done = invoke("export", bundle, "--target", "comfy", "--out", tmp_path / "out", "--no-vnni")
    assert "--in-halves are for target onnx, not comfy" in str(done.exception) and not (tmp_path / "out").exists()


def test_every_target_can_be_chosen():
    help_text = get_type_hints(cli_export.export, include_extras=True)["target"].__metadata__[0].help
    assert all(name in help_text for name in ("diffusers", "onnx", *TARGETS))


def test_the_original_weights_are_rounded_once_for_a_grid_of_its_own(bundle, tmp_path):
    save_file({f"model.{name}": tensor for name, tensor in toy().state_dict().items()}, tmp_path / "w.safetensors")
    done = invoke(
        "export", bundle, "--target", "comfy", "--out", tmp_path / "out", "--original", tmp_path / "w.safetensors"
    )
    assert done.exit_code == 0 and "of the original" in " ".join(done.output.split())
    stored = json.loads((tmp_path / "out" / "fxq_report.json").read_text())
    forms = {layer["layer"]: (layer["form"], layer["original_sqnr_db"]) for layer in stored["layers"]}
    assert forms["blocks.0.up"][0] == "int8 rotated" and forms["blocks.0.up"][1] > 35
    gone = invoke("export", bundle, "--target", "comfy", "--out", tmp_path / "no", "--original", tmp_path / "none.pt")
    assert isinstance(gone.exception, fxq.CheckpointError) and not (tmp_path / "no").exists()


def test_a_model_can_be_said_to_be_causal_and_be_split_by_block(bundle, tmp_path):
    options = ("--target", "lightx2v", "--out", tmp_path / "out", "--causal", "--per-block")
    assert invoke("export", bundle, *options).exit_code == 0
    names = load_file(tmp_path / "out" / "non_block.safetensors")
    assert set(names) == {"model.head.weight", "model.head.bias"}
    assert "blocks.0.up.weight_scale" in load_file(tmp_path / "out" / "block_0.safetensors")


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--target", "tensorrt"), "for TensorRT"), (("--target", "onnx", "--in-halves"), "on every CPU")],
)
def test_onnx_files_are_written_for_tensorrt_and_in_halves(bundle, options, said, tmp_path):
    pytest.importorskip("onnx")
    done = invoke("export", bundle, "--out", tmp_path / "toy.onnx", *options)
    assert done.exit_code == 0 and said in " ".join(done.output.split())
    assert len(check_onnx(tmp_path / "toy.onnx")) == 2
    done = invoke("export", bundle, "--out", tmp_path / "b.onnx", *options, "--vnni")
    assert isinstance(done.exception, fxq.ExportError) and "vnni" in str(done.exception)
