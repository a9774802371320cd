import dataclasses
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import fxq
from fxq import cpu, numerics
from fxq.cache.policy import CachePolicy
from fxq.calls.captured import catch_up
from fxq.core.ir import get_tensor, inherit_meta
from fxq.export.capture import ExportError
from fxq.export.onnx import check_onnx, export_onnx, output_names
from fxq.export.program import export_program
from fxq.models.runtime import runtime_facts
from tests.features import needs
from tests.toys import recipe, rows, toy, wan_rollout

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

X = rows(9, 96)
BYTES = onnx.TensorProto.UINT8 if cpu.saturates() else onnx.TensorProto.INT8
"""Of 8-bit weights in a file that is exported here."""


def session(path, **options):
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads, chosen.log_severity_level = 1, 3
    for name, value in options.items():
        setattr(chosen, name, value)
    return ort.InferenceSession(str(path), chosen, providers=["CPUExecutionProvider"])


def run(path, *args):
    s = session(path)
    leaves = pytree.tree_leaves(args)
    return s.run(None, {info.name: leaf.numpy() for info, leaf in zip(s.get_inputs(), leaves, strict=True)})


def assert_same(path, module, args):
    with torch.no_grad():
        want = pytree.tree_leaves(module(*args))
    for got, tensor in zip(run(path, *args), want, strict=True):
        assert got.shape == tensor.shape
        difference = np.linalg.norm(got - tensor.numpy())
        assert difference <= 1e-5 * np.linalg.norm(tensor.numpy())


@pytest.fixture(scope="module")
def toys():
    return {bits: fxq.quantize(toy(), [X], recipe(bits), progress=False) for bits in (4, 8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def files(toys, folder):
    return {bits: export_onnx(q, folder / f"toy{bits}.onnx", metadata={"steps": [1, 2]}) for bits, q in toys.items()}


@pytest.fixture(scope="module")
def forms(toys, folder):
    """The 8-bit toy for CPUs with VNNI, and for those without."""
    return {vnni: export_onnx(toys[8], folder / f"vnni-{vnni}.onnx", vnni=vnni) for vnni in (True, False)}


@pytest.fixture(scope="module")
def rollout():
    return wan_rollout()


@pytest.fixture(scope="module")
def wan(rollout):
    return fxq.quantize(rollout.denoiser, rollout, recipe(4), progress=False)


@pytest.fixture(scope="module")
def wan_file(wan, folder):
    return export_onnx(wan, folder / "wan.onnx")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 9, 130])
def test_onnxruntime_computes_what_the_module_does(files, toys, bits, count):
    assert_same(files[bits], toys[bits], (rows(count, 96, seed=count),))


@pytest.mark.parametrize("vnni", [pytest.param(True, marks=needs("exact_bytes")), False])
def test_a_file_for_either_kind_of_cpu_computes_what_the_module_does(toys, forms, vnni):
    assert_same(forms[vnni], toys[8], (rows(130, 96, seed=3) * 2,))
    assert [entry.products for entry in check_onnx(forms[vnni])] == [2, 1]


def weights_of(path):
    """(data type, largest sum of two products that a runtime may form) of every stored integer weight."""
    model, found = onnx.load(path), []
    top = {onnx.TensorProto.INT8: 128, onnx.TensorProto.INT4: 8}
    for t in model.graph.initializer:
        if t.name.endswith("weight") and "head" not in t.name:
            found.append((t.data_type, 2 * 255 * top.get(t.data_type, 0)))
    return found


def test_without_vnni_no_signed_weight_can_saturate_sums_of_two_products(files, forms):
    found = {bits: weights_of(path) for bits, path in ((4, files[4]), (8, forms[False]))}
    assert {kind for kind, _ in found[8]} == {onnx.TensorProto.UINT8}
    assert {kind for kind, _ in found[4]} == {onnx.TensorProto.INT4}
    assert all(largest < 2**15 for kinds in found.values() for _, largest in kinds)


def test_a_file_is_written_for_the_kind_of_cpu_that_exports_it(toys, tmp_path, monkeypatch):
    for saturates, kind in ((True, onnx.TensorProto.UINT8), (False, onnx.TensorProto.INT8)):
        monkeypatch.setattr(cpu, "saturates", lambda saturates=saturates: saturates)
        assert {k for k, _ in weights_of(export_onnx(toys[8], tmp_path / "toy.onnx"))} == {kind}


def test_the_check_says_that_a_file_is_right_and_this_cpu_is_not(files, forms, tmp_path, monkeypatch):
    path = forms[True]
    monkeypatch.setattr(cpu, "saturates", lambda: True)
    reason = (
        r"is right, and this CPU would compute it wrong: this CPU has no VNNI.* 2 of 2 quantized layers: blocks.0.up"
    )
    with pytest.raises(ExportError, match=rf"{reason}, blocks.0.down\. Export with vnni=False .*x64quantprecision = 1"):
        check_onnx(path)
    model = onnx.load(path)
    (entry,) = (p for p in model.metadata_props if p.key == "fxq")
    facts = json.loads(entry.value)
    assert facts.pop("needs_vnni") == ["blocks.0.up", "blocks.0.down"]
    entry.value = json.dumps(facts)  # as older versions wrote it
    onnx.save(model, tmp_path / "older.onnx")
    with pytest.raises(ExportError, match=reason):
        check_onnx(tmp_path / "older.onnx")
    assert len(check_onnx(forms[False])) == len(check_onnx(files[4])) == 2
    monkeypatch.setattr(cpu, "saturates", lambda: False)
    assert len(check_onnx(tmp_path / "older.onnx")) == 2


def test_activations_of_fewer_bits_need_no_vnni(tmp_path, monkeypatch):
    q = fxq.quantize(toy(), [X], recipe(8, input_bits=7), progress=False)
    path = export_onnx(q, tmp_path / "toy.onnx", vnni=True)
    assert_same(path, q, (rows(130, 96, seed=3) * 2,))
    monkeypatch.setattr(cpu, "saturates", lambda: True)
    assert len(check_onnx(path)) == 2
    made = [n.output[0] for n in onnx.load(path).graph.node if n.op_type == "QuantizeLinear"]
    model = onnx.load(path)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in made)
    onnx.save(model, tmp_path / "watched.onnx")
    assert max(int(q.max()) for q in run(tmp_path / "watched.onnx", X * 9)[1:]) == 127


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_rank_two_run_integer_kernels(files, bits):
    up, down = check_onnx(files[bits])
    assert (up.layer, up.bits, up.products) == ("blocks.0.up", bits, 2)
    assert (down.layer, down.bits, down.products) == ("blocks.0.down", bits, 1)
    assert up.kernel == down.kernel == "MatMulIntegerToFloat"


def test_a_float_product_is_named_by_the_check(files, tmp_path):
    model = onnx.load(files[8])
    for node in model.graph.node:
        if node.op_type == "Sum" and len(node.input) == 2:
            node.op_type = "Add"  # as the converter has it: one Gemm of floats
    onnx.save(model, tmp_path / "adds.onnx")
    with pytest.raises(ExportError, match=r"multiplies floats in 1 of 2 quantized layers: blocks.0.down"):
        check_onnx(tmp_path / "adds.onnx")


def test_the_integers_in_the_file_are_those_of_the_reference(files, toys, tmp_path):
    model = onnx.load(files[8])
    made = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in made)
    onnx.save(model, tmp_path / "watched.onnx")
    x = rows(500, 96, seed=8) * 1.3
    got = [torch.from_numpy(q).short() - 128 for q in run(tmp_path / "watched.onnx", x)[1:]]
    perm, scale, zero = (get_tensor(toys[8], f"blocks.0.up.{n}") for n in ("perm", "input_scale", "input_zero_point"))
    want = numerics.quantize_input(x[:, perm], scale, zero, 64, 8).short()
    assert torch.equal(got[0][:, perm[:64]], want[:, :64])
    assert torch.equal(got[1], want[:, 64:])


def test_the_file_has_standard_operators_and_stored_integers(files):
    sizes = {}
    for bits, file in files.items():
        model = onnx.load(file)
        assert {(o.domain, o.version) for o in model.opset_import if o.domain == ""} == {("", 21)}
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
        stored = {t.name: t for t in model.graph.initializer}
        kind = onnx.TensorProto.INT4 if bits == 4 else BYTES
        weights = [t for name, t in stored.items() if name.endswith("weight") and "head" not in name]
        assert {t.data_type for t in weights} == {kind}
        assert len(weights) == 3
        sizes[bits] = sum(len(t.raw_data) for t in weights)
        assert list(stored["blocks.0.down.weight"].dims) == [64, 96]
    assert sizes[8] == 2 * sizes[4]


def test_the_metadata_say_what_the_file_holds(files):
    entry = {p.key: p.value for p in onnx.load(files[4]).metadata_props}["fxq"]
    assert json.loads(entry) == {
        "call": {"names": ["x"], "inputs": [[None, 96]], "dtypes": ["float32"], "conditions": []},
        "fxq_version": fxq.__version__,
        "layers": {"blocks.0.up": 4, "blocks.0.down": 4},
        "needs_vnni": [],
        "runtime": {"steps": [1, 2]},
    }


class Writes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(64, 64)

    def forward(self, x, cache):
        cache[:, 1:].copy_(self.fc(x)[:, 1:])
        return cache * 2


def test_a_model_that_writes_to_its_input_has_no_onnx_form(tmp_path):
    batch = (torch.randn(4, 64), torch.zeros(4, 64))
    q = fxq.quantize(Writes().eval(), [batch], recipe(8), progress=False)
    with pytest.raises(ExportError, match="writes to its input cache in place, which an ONNX file cannot"):
        export_onnx(q, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_no_path_of_this_machine_is_in_the_file(files):
    for file in files.values():
        assert b".py" not in file.read_bytes()


@pytest.mark.parametrize(
    ("batch", "prompt", "text", "cache"), [(2, 4, 3, 6), (1, 5, 0, 0), (3, 0, 5, 0), (1, 0, 5, 24)]
)
def test_lengths_of_the_caches_may_vary(wan, wan_file, rollout, batch, prompt, text, cache):
    (x, t, context, *_, cos, sin), _ = rollout.example_call()
    make = torch.Generator().manual_seed(batch)

    def tensors(length):
        return [torch.randn(batch, length, 2, 32, generator=make)]

    prompt = torch.randn(batch, prompt, context.shape[2], generator=make)
    x, t = x[:1].expand(batch, *x.shape[1:]).contiguous(), t[:1].expand(batch, -1).contiguous()
    args = (x, t, prompt, tensors(text), tensors(text), tensors(cache), tensors(cache), cos, sin)
    assert_same(wan_file, wan, args)


def test_every_layer_of_a_denoiser_runs_an_integer_kernel(wan, wan_file):
    layers = check_onnx(wan_file)
    assert [entry.layer for entry in layers] == [row.layer for row in fxq.summary(wan).quantized]
    assert len(layers) == 12
    assert {entry.kernel for entry in layers} == {"MatMulIntegerToFloat"}


def test_inputs_and_outputs_are_named_after_the_call(wan_file):
    s = session(wan_file)
    assert [i.name for i in s.get_inputs()] == [
        "x", "t", "context", "cross_k_0", "cross_v_0", "prefix_k_0", "prefix_v_0", "cos", "sin",
    ]  # fmt: skip
    assert [o.name for o in s.get_outputs()] == ["output_0", *(f"output_{i}_0" for i in (1, 2, 3, 4))]
    assert isinstance(s.get_inputs()[5].shape[1], str)


@pytest.mark.parametrize(
    ("value", "names"),
    [(1, ["output"]), ((1, [2, 3]), ["output_0", "output_1_0", "output_1_1"]), ({"y": 1}, ["output_y"])],
)
def test_outputs_are_named_by_their_place(value, names):
    assert output_names(pytree.tree_structure(value)) == names


@pytest.mark.any_cpu
def test_large_files_keep_their_tensors_beside(toys, tmp_path):
    path = tmp_path / "toy.onnx"
    for bits in (8, 4):
        export_onnx(toys[bits], path, external_above=1000)
        (data,) = tmp_path.glob("toy.onnx.*.data")
        assert data.stat().st_size > 3 * path.stat().st_size // 4
        assert [entry.bits for entry in check_onnx(path)] == [bits, bits]
        assert_same(path, toys[bits], (X,))
    export_onnx(toys[4], path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["toy.onnx"]


FRESH = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
y = session.run(None, {"x": numpy.load(sys.argv[2])})[0]
assert "torch" not in sys.modules and "fxq" not in sys.modules
numpy.save(sys.argv[3], y)
"""


def test_a_fresh_process_needs_numpy_and_onnxruntime_only(toys, tmp_path):
    path = export_onnx(toys[4], tmp_path / "toy.onnx", external_above=1000)
    np.save(tmp_path / "x.npy", X.numpy())
    command = [sys.executable, "-c", FRESH, str(path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), toys[4](X).detach(), rtol=1e-4, atol=1e-5)


def test_openvino_reads_the_same_file(toys, files):
    openvino = pytest.importorskip("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    for bits, file in files.items():
        model = openvino.Core().compile_model(str(file), "CPU", settings)
        got, want = model(X.numpy())[0], toys[bits](X).detach().numpy()
        assert np.linalg.norm(got - want) <= 2e-3 * np.linalg.norm(want)
        facts = [op.get_rt_info() for op in model.get_runtime_model().get_ops()]
        kinds = [str(f["primitiveType"].value) for f in facts if f["layerType"].value == "FullyConnected"]
        in_integers = 3 if bits == 4 or BYTES == onnx.TensorProto.INT8 else 0  # it has none for unsigned weights
        assert sum(kind.endswith("I8") for kind in kinds) == in_integers, kinds


@pytest.mark.any_cpu
def test_a_module_without_recorded_values_needs_an_example(toys, tmp_path):
    loaded = fxq.load(fxq.save(toys[8], tmp_path / "bundle"))
    catch_up(loaded)
    for node in loaded.graph.nodes:
        inherit_meta(node, node, None)
    with pytest.raises(ExportError, match=r"no recorded example call .*pass example=\(args, dynamic_shapes\)"):
        export_onnx(loaded, tmp_path / "toy.onnx")
    with pytest.raises(ExportError, match="input x: dimension 0 varies in the module and is fixed at 9 in the export"):
        export_onnx(loaded, tmp_path / "toy.onnx", example=((X,), None))
    assert not (tmp_path / "toy.onnx").exists()
    path = export_onnx(loaded, tmp_path / "toy.onnx", example=((X,), ({0: torch.export.Dim.AUTO},)))
    assert_same(path, toys[8], (X[:3],))


def test_a_loaded_module_exports_as_the_one_that_was_saved(toys, files, tmp_path):
    path = export_onnx(fxq.load(fxq.save(toys[8], tmp_path / "bundle")), tmp_path / "toy.onnx")
    assert_same(path, toys[8], (X[:3],))
    assert [node.op_type for node in onnx.load(path).graph.node] == [n.op_type for n in onnx.load(files[8]).graph.node]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype, tmp_path):
    q = fxq.quantize(toy().to(dtype), [X.to(dtype)], recipe(), progress=False)
    with pytest.raises(ExportError, match=rf"head\.\w+ is {dtype}: ONNX Runtime's CPU kernels are float32"):
        export_onnx(q, tmp_path / "toy.onnx")


def test_modules_that_fxq_did_not_make_or_has_optimized_are_refused(toys, tmp_path):
    with pytest.raises(ExportError, match="it carries no fxq facts"):
        export_onnx(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)), tmp_path / "x.onnx")
    with pytest.raises(ExportError, match="optimized for its device; export the module it was made from"):
        export_onnx(fxq.optimize(toys[8]), tmp_path / "x.onnx")


@pytest.mark.parametrize("write", [export_onnx, export_program])
def test_metadata_that_json_cannot_hold_are_refused(toys, tmp_path, write):
    with pytest.raises(ExportError, match="metadata cannot be written as JSON: Object of type Tensor"):
        write(toys[8], tmp_path / "x.onnx", metadata={"x": X})
    assert not list(tmp_path.iterdir())


def test_a_missing_package_says_what_to_install(toys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"needs the package onnxscript: pip install 'fxq\[onnx\]'"):
        export_onnx(toys[8], tmp_path / "x.onnx")


def test_files_that_are_not_exports_are_refused_by_the_check(files, tmp_path):
    with pytest.raises(ExportError, match="cannot be loaded"):
        check_onnx(tmp_path / "absent.onnx")
    (tmp_path / "short.onnx").write_bytes(files[8].read_bytes()[:-200])
    with pytest.raises(ExportError, match="cannot be loaded"):
        check_onnx(tmp_path / "short.onnx")
    model = onnx.load(files[8])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ExportError, match="no fxq entry in its metadata"):
        check_onnx(tmp_path / "other.onnx")


@pytest.mark.any_cpu
@pytest.mark.parametrize("threshold", [1000, pytest.param(1 << 31, marks=pytest.mark.sweep)])
def test_a_failed_write_leaves_the_old_files(toys, tmp_path, monkeypatch, threshold):
    path = export_onnx(toys[8], tmp_path / "toy.onnx", external_above=threshold)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    replace = os.replace

    def fail(source, target):
        if pathlib.Path(target) == path:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ExportError, match=r"cannot write .*toy.onnx: .*No space left on device"):
        export_onnx(toys[4], path, external_above=threshold)
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert_same(path, toys[8], (X,))


def test_runtime_facts_say_what_a_runtime_needs(rollout):
    facts = runtime_facts(rollout)
    assert json.loads(json.dumps(facts)) == facts
    expected = {"layers": 1, "heads": 2, "head_dim": 32, "tokens_per_frame": 6, "frames_per_chunk": 2, "frames": 6}
    assert expected.items() <= facts.items()
    assert (facts["window"], facts["sink"], facts["latent"]) == (-1, 0, [3, 4, 6])
    assert facts["chunk"]["timesteps"] == list(rollout.sampler.timesteps(False))
    np.testing.assert_allclose(facts["chunk"]["sigmas"], np.array(facts["chunk"]["timesteps"]) / 1000, rtol=1e-5)


@pytest.mark.sweep
def test_the_benchmark_reports_kernels_and_ratios(tmp_path):
    script = pathlib.Path(__file__).parents[2] / "benchmarks" / "onnx_runtime.py"
    options = ["--rows", "6", "--rounds", "3", "--cases", "768,64", "--out", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 MatMulIntegerToFloat | 6 x 768,64: CPU time" in done.stdout
    (row,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert row["wall"]["ratio_low"] <= row["wall"]["ratio"] <= row["wall"]["ratio_high"]


EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "onnx_rollout.py"


@pytest.mark.sweep
def test_the_example_generates_the_video_of_fxq_without_torch(tmp_path):
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "42 layers on integer kernels of ONNX Runtime" in done.stdout
    assert float(done.stdout.split()[-1]) < 0.02


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("window", "sink", "prediction"),
    [(4, 1, "x0"), *(pytest.param(*p, marks=pytest.mark.sweep) for p in ((-1, 0, "flow"), (5, 2, "flow")))],
)
def test_the_runtime_of_the_example_follows_every_cache_policy(tmp_path, window, sink, prediction):
    rollout = wan_rollout(frames=10)
    schedule = dataclasses.replace(rollout.sampler.schedule, prediction=prediction)
    rollout.sampler = dataclasses.replace(
        rollout.sampler, cache=CachePolicy(window=window, sink=sink), schedule=schedule
    )
    rollout.sampler = dataclasses.replace(rollout.sampler, first_chunk_steps=(1000, 250), context_noise=10.0)
    q = fxq.quantize(rollout.denoiser, rollout, recipe(8), progress=False)
    path = export_onnx(q, tmp_path / "wan.onnx", metadata=runtime_facts(rollout))
    example = runpy.run_path(str(EXAMPLE), run_name="example")
    example["write_inputs"](tmp_path, rollout)
    inputs = np.load(tmp_path / "inputs.npz")
    got = example["generate"](*example["open_session"](path), inputs["prompt"], inputs["noise"], inputs["renoise"])
    with rollout.using(q):
        want = rollout.rollout(*rollout.batches[0]).numpy()
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.slow
def test_the_example_generates_the_same_video_with_openvino(tmp_path):
    openvino = pytest.importorskip("openvino")
    rollout = wan_rollout()
    q = fxq.quantize(rollout.denoiser, rollout, recipe(4), progress=False)
    path = export_onnx(q, tmp_path / "wan.onnx", metadata=runtime_facts(rollout))
    example = runpy.run_path(str(EXAMPLE), run_name="example")
    example["write_inputs"](tmp_path, rollout)
    inputs = np.load(tmp_path / "inputs.npz")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(str(path), "CPU", settings)

    def denoise(values):
        found = model(values)
        return [np.array(found[i]) for i in range(len(model.outputs))]

    got = example["generate"](denoise, runtime_facts(rollout), inputs["prompt"], inputs["noise"], inputs["renoise"])
    with rollout.using(q):
        want = rollout.rollout(*rollout.batches[0]).numpy()
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def test_the_code_of_the_page_on_deployment_runs(tmp_path, monkeypatch, capsys):
    page = pathlib.Path(__file__).parents[2] / "docs" / "deployment.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    code = [block for block in blocks if "aoti=True" not in block]
    assert (len(blocks), len(code)) == (5, 4)
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(code), str(page), "exec"), {"__name__": "docs_deployment"})
    assert "0 8 MatMulIntegerToFloat 1" in capsys.readouterr().out
