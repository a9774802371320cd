"""Bundles, exports and the user's own module with layers whose input scales are measured per token."""

import json

import pytest
import torch

import fxq
from fxq import cpu
from fxq.core.ir import put_tensor
from fxq.export import read_manifest, read_receipt, verify_bundle
from fxq.export.contract import _layers
from fxq.export.interop import TARGETS, Options, export_bundle
from fxq.export.interop.layers import read_model
from fxq.export.onnx import check_onnx, export_onnx
from fxq.export.program import export_program, load_program
from fxq.kernels import native
from tests.export.test_bundle import resign
from tests.toys import recipe, relative_error, rows, toy

X = rows(9, 96)
SPREAD = X * torch.logspace(-3, 3, 9)[:, None]


@pytest.fixture(scope="module", params=[4, 8])
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(bits):
    return fxq.quantize(toy(), None, recipe(bits, per_token=True), example_inputs=X, progress=False)


@pytest.fixture(scope="module")
def bundle(quantized, tmp_path_factory):
    return fxq.save(quantized, tmp_path_factory.mktemp("bundles") / "toy")


def test_a_bundle_gives_the_same_module_back(quantized, bundle):
    loaded = fxq.load(bundle)
    assert torch.equal(loaded(SPREAD), quantized(SPREAD))
    assert relative_error(quantized, fxq.optimize(loaded), SPREAD) < 1e-5
    assert [row.bits for row in fxq.summary(loaded).rows] == [row.bits for row in fxq.summary(quantized).rows]


def test_a_manifest_names_what_a_layer_stores(bundle):
    layers = read_manifest(bundle).layers
    names = {name.rpartition(".")[2] for name in layers["blocks.0.up"].tensors}
    assert names == {"weight", "weight_scale", "offset", "perm"}
    assert layers["blocks.0.up"].plan["scheme"]["per_token"] is True
    assert "output_sqnr_db_lowest" not in read_receipt(bundle).metrics


def test_a_sound_bundle_passes_every_check(bundle, bits):
    verdict = verify_bundle(bundle)
    assert verdict.ok and {check.status for check in verdict.checks} == {"passed"}
    label, names = f"W{bits}A8 per token", ("quantize_per_token", "dual_scale_linear_per_token")
    quantize, product = (fxq.kernels.used(name, "cpu") for name in names)
    assert [(c.layer, c.bits, c.quantize_kernel, c.linear_kernel) for c in verdict.layers] == [
        (layer, label, quantize, product) for layer in ("blocks.0.up", "blocks.0.down")
    ]


def test_an_input_quantized_with_other_bits_is_a_problem(quantized, tmp_path):
    path = fxq.save(quantized, tmp_path / "b", fingerprint=False)
    graph = json.loads((path / "graph.json").read_text())
    for node in graph["nodes"]:
        if node["target"] == "fxq.quantize_per_token.default":
            node["args"][3] = 6
    (path / "graph.json").write_text(json.dumps(graph))
    resign(path)
    assert verify_bundle(path).layers[0].problems == ("6-bit inputs, planned 8",)


def test_the_swapped_model_computes_what_the_graph_does(quantized, bundle):
    for source in (quantized, bundle):
        applied = fxq.apply(toy(), source)
        assert torch.equal(applied(SPREAD), quantized(SPREAD))
    up = applied.blocks[0].up
    assert up.per_token and (up.panels is not None) == native.ready() and "per token" in repr(up)
    assert set(up.state_dict()) == {"integers", "weight_scale", "offset", "perm", "like"}
    applied.load_state_dict(applied.half().state_dict())
    assert up.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("target", TARGETS)
def test_other_formats_take_the_weights_and_say_that_inputs_stay_as_they_were(target, bundle, bits, tmp_path):
    original = toy().state_dict() if target == "sglang" else None
    report = export_bundle(bundle, target, tmp_path / "out", Options(widen=True, original=original))
    assert report.activations == "int8 per token, measured at run time, as in the bundle"
    assert {record.layer for record in report.layers} >= {"blocks.0.up", "blocks.0.down"}
    for name, stored in read_model(bundle).layers.items():
        assert torch.equal(stored.bias, toy().get_submodule(name).bias)
        assert stored.integers.dtype == torch.int8 and stored.bits == bits


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
    assert float(error.max()) < 1e-5


@pytest.mark.sweep
@pytest.mark.parametrize("bits", [4, 8], indirect=True)
def test_a_compiled_program_multiplies_integers_and_agrees(quantized, bits, tmp_path):
    path = export_program(quantized, tmp_path / "p", aoti=True)
    facts = json.loads((path / "program.json").read_text())
    in_halves = cpu.saturates() and bits == 8
    assert facts["integer_products"] == (6 if in_halves else 3) and facts["imports"] == ["torch"]
    torch.testing.assert_close(load_program(path)(SPREAD), quantized(SPREAD), rtol=1e-4, atol=1e-2)


def test_a_weight_stored_in_float_as_well_is_found(bits):
    q = fxq.quantize(toy(), None, recipe(bits, per_token=True), example_inputs=X, progress=False)
    put_tensor(q, "copy", toy().blocks[0].up.weight.detach())
    first, second = _layers(q, "cpu")
    assert first.problems == ("its weight is stored in float as well, as copy",) and not second.problems
