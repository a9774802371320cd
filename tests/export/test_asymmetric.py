"""Bundles, exports and the user's own module with layers that measure zero points per token."""

import json

import pytest
import torch

import fxq
from fxq.export import read_manifest, verify_bundle
from fxq.export.files import BundleError
from fxq.export.interop import InteropError, Options, export_bundle
from fxq.export.onnx import check_onnx, export_onnx
from fxq.export.program import export_program, load_program
from fxq.kernels import native
from tests.export.test_bundle import resign
from tests.toys import recipe, relative_error, rows, toy

X = rows(9, 96)
SPREAD = (X + torch.linspace(-4, 4, 9)[:, None]) * torch.logspace(-3, 3, 9)[:, None]
LAYERS = ("blocks.0.up", "blocks.0.down")


@pytest.fixture(scope="module", params=[4, 8])
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(bits):
    chosen = recipe(bits, per_token=True, asymmetric=True)
    return fxq.quantize(toy(), None, chosen, example_inputs=X, progress=False)


@pytest.fixture(scope="module")
def bundle(quantized, tmp_path_factory):
    return fxq.save(quantized, tmp_path_factory.mktemp("bundles") / "toy")


def test_a_bundle_gives_the_same_module_back(quantized, bundle, bits):
    loaded = fxq.load(bundle)
    assert torch.equal(loaded(SPREAD), quantized(SPREAD))
    assert relative_error(quantized, fxq.optimize(loaded), SPREAD) < 1e-5
    assert {row.bits for row in fxq.summary(loaded).quantized} == {f"W{bits}A8 per token, asymmetric"}
    assert read_manifest(bundle).layers[LAYERS[0]].plan["scheme"]["asymmetric"] is True


def test_a_sound_bundle_passes_every_check(bundle, bits):
    verdict = verify_bundle(bundle)
    assert verdict.ok and {check.status for check in verdict.checks} == {"passed"}
    quantize, product = (
        fxq.kernels.used(name, "cpu") for name in ("quantize_per_token_asymmetric", "dual_scale_linear_per_token")
    )
    assert [(c.layer, c.bits, c.quantize_kernel, c.linear_kernel) for c in verdict.layers] == [
        (layer, f"W{bits}A8 per token, asymmetric", quantize, product) for layer in LAYERS
    ]


def with_graph(module, path, change):
    """A bundle whose graph was changed and that says so in its seal."""
    fxq.save(module, path, fingerprint=False)
    graph = json.loads((path / "graph.json").read_text())
    for node in graph["nodes"]:
        change(node)
    (path / "graph.json").write_text(json.dumps(graph))
    resign(path)
    return path


def test_the_quantize_of_another_scheme_is_refused_at_load(quantized, tmp_path):
    def symmetric(node):
        if node["target"] == "fxq.quantize_per_token_asymmetric.default":
            node["target"] = "fxq.quantize_per_token.default"

    with pytest.raises(
        BundleError, match=r"blocks.0.up: its input is made by fxq.quantize_per_token.default, the plan says"
    ):
        fxq.load(with_graph(quantized, tmp_path / "b", symmetric))


def test_zero_points_without_scales_per_token_are_refused_at_load(quantized, tmp_path):
    path = fxq.save(quantized, tmp_path / "b", fingerprint=False)
    text = (path / "graph.json").read_text()
    assert '"per_token": true' in text or '"per_token":true' in text
    (path / "graph.json").write_text(
        text.replace('"per_token": true', '"per_token": false').replace('"per_token":true', '"per_token":false')
    )
    resign(path)
    with pytest.raises(BundleError):
        fxq.load(path)


def test_the_swapped_model_computes_what_the_graph_does(quantized, bundle):
    for source in (quantized, bundle):
        applied = fxq.apply(toy(), source)
        assert torch.equal(applied(SPREAD), quantized(SPREAD))
    up = applied.blocks[0].up
    assert up.per_token and up.asymmetric and (up.panels is not None) == native.ready()
    assert "per token, asymmetric" in repr(up)


@pytest.mark.parametrize("target", ["lightx2v", "vllm-omni", "comfy", "sglang", "diffusers-torchao"])
def test_formats_without_zero_points_are_refused_by_the_names_of_layers(target, bundle, tmp_path):
    message = r"2 layers measure zero points per token \(blocks.0.up, blocks.0.down\); .* measures scales alone"
    with pytest.raises(InteropError, match=message):
        export_bundle(bundle, target, tmp_path / "out", Options(widen=True))


def test_compressed_tensors_measure_zero_points_too(bundle, tmp_path):
    report = export_bundle(bundle, "compressed-tensors", tmp_path / "out", Options(widen=True))
    assert report.activations == "int8 per token with a zero point, measured at run time, as in the bundle"
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["input_activations"]["symmetric"] is False
    assert group["weights"]["symmetric"] is True


def test_compressed_tensors_tell_two_kinds_of_inputs_apart(tmp_path):
    rules = (fxq.Rule("*.up", fxq.Scheme(per_token=True, asymmetric=True)), fxq.Rule("*", fxq.Scheme(per_token=True)))
    chosen = fxq.Recipe(name="mixed", rules=rules, methods=recipe().methods, weighting="uniform")
    q = fxq.quantize(toy(), None, chosen, example_inputs=X, progress=False)
    report = export_bundle(fxq.save(q, tmp_path / "b"), "compressed-tensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    kinds = {tuple(g["targets"]): g["input_activations"]["symmetric"] for g in config["config_groups"].values()}
    names = {record.layer: record.name for record in report.layers}
    assert kinds == {(names[LAYERS[0]],): False, (names[LAYERS[1]], "head"): True}
    assert report.activations.startswith("int8 per token, measured at run time or int8 per token with a zero point")


def test_a_program_without_weights_computes_the_same(quantized, tmp_path):
    assert torch.equal(load_program(export_program(quantized, tmp_path / "p"))(SPREAD), quantized(SPREAD))


def test_onnx_runtime_multiplies_integers_and_agrees(quantized, bits, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = export_onnx(quantized, tmp_path / "toy.onnx")
    assert [(layer.bits, layer.kernel, layer.products) for layer in check_onnx(path)] == [
        (bits, "MatMulIntegerToFloat", 2),
        (bits, "MatMulIntegerToFloat", 1),
    ]
    x = torch.cat((SPREAD, torch.zeros(1, 96)))
    session = runtime.InferenceSession(str(path))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = quantized(x)
    error = (torch.from_numpy(got) - want).norm(dim=1) / want.norm(dim=1)
    assert float(error.max()) < 1e-4
