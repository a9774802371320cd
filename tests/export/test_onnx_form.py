import collections

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import fxq
from fxq.export.capture import ExportError
from fxq.export.onnx import check_onnx, export_onnx
from fxq.export.onnx_form import tensorrt_faults
from tests.features import needs
from tests.toys import recipe, rows, toy, wan_rollout

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

X = rows(9, 96)
SCHEMES = {
    "w8a8": (8, {}),
    "w4a8": (4, {}),
    "w4a6": (4, {"input_bits": 6}),
    "dynamic": (8, {"per_token": True}),
    "token": (4, {"per_token": True, "asymmetric": True}),
}


@pytest.fixture(scope="module")
def modules():
    return {
        name: fxq.quantize(toy(), [X], recipe(bits, **scheme), progress=False)
        for name, (bits, scheme) in SCHEMES.items()
    }


def run(path, *inputs):
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})[0]


def operators(path):
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@needs("vnni")
@pytest.mark.parametrize("name", SCHEMES)
def test_a_file_for_tensorrt_computes_the_same_by_its_rules(modules, name, tmp_path):
    path = export_onnx(modules[name], tmp_path / "m.onnx", target="tensorrt")
    model = onnx.load(path)
    assert not tensorrt_faults(model) and operators(path)["QuantizeLinear"] == 3
    assert {t.data_type for t in model.graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, 7}
    assert [(layer.kernel, layer.products) for layer in check_onnx(path)] == [("tensorrt", 2), ("tensorrt", 1)]
    want = modules[name](X).numpy()
    assert np.linalg.norm(run(path, X) - want) <= 1e-5 * np.linalg.norm(want)


def change(model, **changes):
    """A model whose first QuantizeLinear reads other constants."""
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    for place, array in changes.items():
        name = node.input[{"scale": 1, "zero": 2}[place]]
        value = onnx.numpy_helper.from_array(array, f"{name}_changed")
        model.graph.initializer.append(value)
        node.input[list(node.input).index(name)] = value.name
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero": np.array(3, np.int8)}, "the zero point is not 0 in int8"),
        ({"zero": np.array(0, np.uint8)}, "the zero point is not 0 in int8"),
        ({"scale": np.array(0.5, np.float32)}, "no QuantizeLinear of the same scale is before it"),
        ({"scale": np.array(-0.5, np.float32)}, "a scale is not positive"),
    ],
)
def test_a_broken_rule_of_tensorrt_is_named_and_refused_by_the_check(modules, changes, message, tmp_path):
    path = export_onnx(modules["w8a8"], tmp_path / "m.onnx", target="tensorrt")
    model = change(onnx.load(path), **changes)
    assert any(message in fault for fault in tensorrt_faults(model))
    onnx.save(model, path)
    with pytest.raises(ExportError, match=f"TensorRT would refuse it: .*{message}"):
        check_onnx(path)


def test_a_file_for_cpus_breaks_the_rules_of_tensorrt(modules, tmp_path):
    path = export_onnx(modules["w4a8"], tmp_path / "m.onnx")
    faults = " ".join(tensorrt_faults(onnx.load(path)))
    assert "has INT4 elements" in faults and "the zero point is not 0 in int8" in faults
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            node.input[1] = "elsewhere"
    assert any("the scale is no constant" in fault for fault in tensorrt_faults(model))


@pytest.mark.parametrize("name", ["w8a8", "dynamic"])
def test_halves_of_seven_bits_are_exact_on_every_cpu(modules, name, tmp_path, monkeypatch):
    path = export_onnx(modules[name], tmp_path / "m.onnx", in_halves=True)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    whole = export_onnx(modules[name], tmp_path / "w.onnx", vnni=True)
    for tensor in onnx.load(whole).graph.initializer:
        if tensor.name.endswith("weight"):
            if (rest := stored.get(f"{tensor.name}_rest")) is None:
                assert tensor.name == "head.weight"
                continue
            halves = stored[tensor.name], rest
            assert all(half.dtype == np.int8 and -64 <= half.min() <= half.max() <= 64 for half in halves)
            assert (halves[0].astype(int) + halves[1] == onnx.numpy_helper.to_array(tensor)).all()
    assert [layer.products for layer in check_onnx(path)] == [4, 2]
    want = modules[name](X).numpy()
    assert np.linalg.norm(run(path, X) - want) <= 1e-5 * np.linalg.norm(want)
    monkeypatch.setenv("FXQ_CPU", "avx2")
    assert [layer.products for layer in check_onnx(path)] == [4, 2], "such a CPU may run it"


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["dynamic", "token"])
def test_scales_of_tokens_are_reductions_that_take_empty_inputs(name, tmp_path):
    bits, scheme = SCHEMES[name]
    rollout = wan_rollout(seeds=(1,), frames=2)
    module = fxq.quantize(rollout.denoiser, rollout, recipe(bits, **scheme), progress=False)
    path = export_onnx(module, tmp_path / "m.onnx")
    assert operators(path)["ReduceMax"] >= 10 and not operators(path)["TopK"]
    (x, t, context, *_, cos, sin), _ = rollout.example_call()
    text, cache = ([torch.randn(len(x), length, 2, 32)] for length in (3, 0))
    args = (x, t, context[:, :0], text, text, cache, cache, cos, sin)
    with torch.no_grad():
        want = module(*args)[0].numpy()
    got = run(path, *pytree.tree_leaves(args))
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_unknown_targets_and_a_cpu_for_a_gpu_are_refused(modules, tmp_path):
    with pytest.raises(
        ExportError, match="unknown target 'gpu' of an ONNX file: expected one of onnxruntime, tensorrt"
    ):
        export_onnx(modules["w8a8"], tmp_path / "m.onnx", target="gpu")
    with pytest.raises(ExportError, match="TensorRT runs on GPUs: leave them out"):
        export_onnx(modules["w8a8"], tmp_path / "m.onnx", target="tensorrt", vnni=True)
    with pytest.raises(ExportError, match="one form for CPUs with VNNI and without: leave vnni out"):
        export_onnx(modules["w8a8"], tmp_path / "m.onnx", in_halves=True, vnni=True)
    assert not list(tmp_path.iterdir())
