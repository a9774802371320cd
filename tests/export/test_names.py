"""Names that meet in an export: of tensors, layers, inputs and outputs. Each is kept apart or refused by name."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxq
from fxq.export.capture import ExportError
from fxq.export.interop import InteropError, Options, export_bundle
from fxq.export.interop.layers import NamedTensors
from fxq.export.onnx import check_onnx, export_onnx, output_names
from fxq.export.program import export_program, load_program
from tests.toys import recipe, rows

X = rows(9, 96)


class Alike(nn.Module):
    """Layers ``a.b`` and ``a_b``, parameters ``p.q`` and ``p_q``, and tensors called as input and output are."""

    def __init__(self, of_layer=()):
        super().__init__()
        self.a = nn.ModuleDict({"b": nn.Linear(96, 32)})
        self.a_b = nn.Linear(96, 32)
        self.p = nn.ParameterDict({"q": torch.tensor(0.5)})
        self.p_q = nn.Parameter(torch.tensor(2.0))
        self.x, self.output = (nn.Parameter(rows(32, seed=seed)) for seed in (3, 4))
        self.of_layer = tuple(of_layer)
        for name in self.of_layer:
            self.a.b.register_buffer(name, torch.tensor(3.0))

    def forward(self, x):
        y = self.p["q"] * self.a.b(x) + self.p_q * self.a_b(x)
        for name in self.of_layer:
            y = y * self.a.b.get_buffer(name)
        return y * self.x + self.output


class Arguments(nn.Module):
    """An input list whose members are called as another input would be, and an input called as the output."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(96, 32)

    def forward(self, x, x_0, output):
        y = self.up(x[0] + 2 * x_0 + 4 * output)
        return {"a_b": y, "a": {"b": 2 * y}}


def quantized(model, *args, bits=8):
    torch.manual_seed(1)
    return fxq.quantize(model.eval(), [args or (X,)], recipe(bits), progress=False)


def assert_same(got, want):
    for one, other in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-4, atol=1e-4)


def run_onnx(path, *args):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names, leaves = [info.name for info in session.get_inputs()], pytree.tree_leaves(args)
    return session.run(None, {name: leaf.numpy() for name, leaf in zip(names, leaves, strict=True)})


@pytest.mark.parametrize(
    ("bits", "of_layer"), [(8, ["weight_zero_point"]), (4, ["weight_int8", "weight_cast", "zero_point"])]
)
def test_an_onnx_file_keeps_values_of_one_name_apart(bits, of_layer, tmp_path):
    pytest.importorskip("onnxscript")
    module = quantized(Alike(of_layer), bits=bits)
    path = export_onnx(module, tmp_path / "alike.onnx", vnni=False)
    assert_same(run_onnx(path, X), module(X))
    assert [entry.layer for entry in check_onnx(path)] == ["a.b", "a_b"]


def test_an_onnx_file_keeps_inputs_and_outputs_apart(tmp_path):
    pytest.importorskip("onnxscript")
    args = ([rows(9, 96)], rows(9, 96, seed=3), rows(9, 96, seed=4))
    module = quantized(Arguments(), *args)
    assert_same(run_onnx(export_onnx(module, tmp_path / "arguments.onnx"), *args), module(*args))


def test_an_output_that_is_called_as_another_value_gets_a_name_of_its_own():
    pair = pytree.tree_structure({"a_b": 1, "a": {"b": 2}})
    assert output_names(pair) == ["output_a_b", "output_a_b_"]
    assert output_names(pytree.tree_structure(1), ["x", "output", "output_"]) == ["output__"]


@pytest.mark.parametrize("name", ["outlier_weight", "outliers", "weight_rest"])
def test_a_tensor_where_a_lowered_layer_has_its_own_is_refused_by_name(name, tmp_path):
    module = quantized(Alike([name]))
    for export in (export_onnx, lambda *args: export_program(*args, aoti=True)):
        with pytest.raises(ExportError, match=rf"tensor of its own named a\.b\.{name}.*rename it in the model"):
            export(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_and_a_program_keep_values_of_one_name_apart(tmp_path):
    module = quantized(Alike(["weight_zero_point", "outlier_weight"]))
    assert torch.equal(fxq.load(fxq.save(module, tmp_path / "bundle"))(X), module(X))
    assert torch.equal(load_program(export_program(module, tmp_path / "program"))(X), module(X))


@pytest.mark.sweep
def test_a_compiled_program_keeps_values_of_one_name_apart(tmp_path):
    module = quantized(Alike(["weight_zero_point"]))
    assert_same(load_program(export_program(module, tmp_path / "program", aoti=True))(X), module(X))


@pytest.mark.parametrize(
    ("target", "name", "bits"),
    [
        ("comfy", "comfy_quant", 8),
        ("comfy", "weight_s_rel", 4),
        ("diffusers-torchao", "_weight_qdata", 8),
    ],
)
def test_a_tensor_where_another_format_has_its_own_is_refused_by_name(target, name, bits, tmp_path):
    model = Alike([name])
    folder = fxq.save(quantized(model, bits=bits), tmp_path / "bundle")
    original = model.state_dict() if bits == 4 else None
    with pytest.raises(InteropError, match=rf"two tensors of the export are 'a\.b\.{name}'"):
        export_bundle(folder, target, tmp_path / "out", Options(original=original))
    assert not (tmp_path / "out").exists()
    export_bundle(folder, "compressed-tensors", tmp_path / "out", Options(widen=True))


def test_no_way_to_add_tensors_replaces_one():
    found = NamedTensors()
    found |= {"a": torch.ones(1)}
    found.update(b=torch.ones(1))
    assert sorted(found) == ["a", "b"]
    for add in (lambda: found.update({"a": X}), lambda: found.__ior__({"b": X}), lambda: found.__setitem__("a", X)):
        with pytest.raises(InteropError, match="two tensors of the export"):
            add()
    assert torch.equal(found["a"], torch.ones(1)) and torch.equal(found["b"], torch.ones(1))
