"""Bundles of float8: what is stored, files that were tampered with, exports and the user's own module."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch

import fxq
from fxq.core.ir import planned, stored_names
from fxq.core.method import FLOAT8
from fxq.export import contract, read_manifest, verify_bundle
from fxq.export.capture import ExportError
from fxq.export.diffusers_folder import LinearEntry
from fxq.export.onnx import export_onnx
from fxq.export.program import export_program, load_program
from fxq.integrations import torch_compile
from fxq.kernels import float8
from fxq.kernels.gemm import fp8
from fxq.parallel.plan import ParallelError
from fxq.parallel.shard_graph import _refuse_float8
from tests.attacks.corpus import edit_json, edit_tensors
from tests.toys import recipe, relative_error, rows, toy

X = rows(9, 96)


@pytest.fixture(scope="module", params=[False, True], ids=["static", "per token"])
def per_token(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(per_token):
    return fxq.quantize(toy(), [X], recipe(format=FLOAT8, per_token=per_token), progress=False)


@pytest.fixture(scope="module")
def bundle(quantized, tmp_path_factory):
    return fxq.save(quantized, tmp_path_factory.mktemp("bundles") / "toy")


@pytest.fixture
def altered(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "altered")


def test_a_bundle_gives_the_same_module_back(quantized, bundle, per_token):
    loaded = fxq.load(bundle)
    assert torch.equal(loaded(X), quantized(X))
    stored = read_manifest(bundle).tensors
    assert stored["blocks.0.up.weight"].dtype == FLOAT8 and ("blocks.0.up.input_scale" in stored) != per_token
    assert "blocks.0.up.input_zero_point" not in stored
    assert [row.bits for row in fxq.summary(loaded).rows] == [row.bits for row in fxq.summary(quantized).rows]


@pytest.mark.sweep
def test_a_fresh_process_computes_the_same(quantized, bundle, tmp_path, per_token):
    if per_token:
        return  # one process is enough
    torch.save(X, tmp_path / "x.pt")
    program = (
        "import sys, torch, fxq\n"
        "y = fxq.load(sys.argv[1])(torch.load(sys.argv[2]))\n"
        "torch.save(y.detach(), sys.argv[3])\n"
    )
    arguments = [str(bundle), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), quantized(X).detach())


def test_a_sound_bundle_passes_every_check_and_is_told_to_be_slow_here(bundle):
    verdict = verify_bundle(bundle)
    assert verdict.ok and {check.status for check in verdict.checks} == {"passed"}
    assert {(c.quantize_kernel, c.linear_kernel) for c in verdict.layers} == {(fp8.ON_CPU, fp8.ON_CPU)}
    assert "a CPU has no FP8 arithmetic" in verdict.checks[1].detail


def test_a_gpu_without_float8_is_no_place_for_it(quantized, monkeypatch):
    monkeypatch.setattr(fp8, "unusable", lambda device: "float8 needs sm_89, this GPU is sm_86")
    layers = list(contract._layers(quantized, "cuda:0"))
    assert layers and all("float8 needs sm_89, this GPU is sm_86; quantize" in c.problems[-1] for c in layers)


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_nan_in_a_weight_is_refused(altered, nan):
    def edit(tensors):
        tensors["blocks.0.up.weight"].view(torch.uint8)[5, 7] = nan

    edit_tensors(altered, edit)
    refused(altered, "blocks.0.up: the weight has NaN")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-45])
@pytest.mark.parametrize("name", ["weight_scale", "input_scale"])
def test_scales_are_positive_and_finite(altered, per_token, name, value):
    if per_token and name == "input_scale":
        return

    def edit(tensors):
        tensors[f"blocks.0.down.{name}"].view(-1)[0] = value

    edit_tensors(altered, edit)
    refused(altered, f"finite|{name} is no float32 of finite numbers above 0")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight", torch.zeros(64, 96, dtype=torch.int8), "torch.int8|int8"),
        ("weight", torch.zeros(64, 96).to(torch.float8_e5m2), "float8_e5m2"),
        ("weight", torch.zeros(64, 96), "float32"),
        ("weight", torch.zeros(64, 95).to(float8.E4M3), r"\(64, 95\)"),
        ("weight_scale", torch.ones(1, 64), "groups"),
        ("weight_scale", torch.ones(2, 64).to(float8.E4M3), "weight_scale is no float32"),
        ("offset", torch.zeros(64, dtype=torch.float64), "float64"),
    ],
)
def test_tensors_of_another_dtype_or_shape_are_refused(altered, name, tensor, message):
    edit_tensors(altered, lambda tensors: tensors.update({f"blocks.0.up.{name}": tensor}))
    refused(altered, message)


def test_a_plan_of_another_format_is_refused(altered):
    for value, message in (("int", "the plan says|stored|tensors"), ("fp4", "format"), (8, "format")):

        def change(plan, value=value):
            plan["scheme"]["format"] = value

        edit_json(altered, "graph.json", lambda d: [change(n["plan"]) for n in d["nodes"] if plan_in(n)] and None)
        edit_json(
            altered, "manifest.json", lambda d: [change(e["plan"]) for e in d["layers"].values() if plan_in(e)] and None
        )
        refused(altered, message)


def plan_in(entry):
    return bool(entry.get("plan") and entry["plan"]["scheme"])


def refused(folder, message):
    with pytest.raises(fxq.BundleError, match=message):
        fxq.load(folder)
    verdict = verify_bundle(folder)
    assert not verdict.ok and not verdict.layers, "verify must not run what load refuses"


def test_a_program_has_the_operators_and_forms_of_integers_are_refused(quantized, bundle, tmp_path):
    program = load_program(export_program(quantized, tmp_path / "program"))
    assert torch.equal(program(X), quantized(X))
    with pytest.raises(
        ExportError, match=r"layer blocks.0.up and 1 more are float8_e4m3fn: .* exports? that holds FP8"
    ):
        export_onnx(quantized, tmp_path / "x.onnx", example=((X,), {}))
    assert not (tmp_path / "x.onnx").exists()


def test_an_entry_of_a_diffusers_folder_says_the_format(quantized, per_token):
    plan = planned(quantized)["blocks.0.up"][0]
    entry = LinearEntry.of(plan)
    assert entry.plan("blocks.0.up").quantization.format == FLOAT8
    empty = entry.empty_tensors()
    assert set(empty) == set(stored_names(plan)) and empty["weight"].dtype == float8.E4M3


def test_the_users_own_module_computes_it(quantized, bundle):
    model = toy()
    applied = fxq.apply(model, bundle)
    assert relative_error(quantized, applied, X) < 1e-6
    layer = applied.blocks[0].up
    assert layer.panels is None and layer.input_zero_point is None and layer.integers.dtype == float8.E4M3
    applied.half().float()
    assert layer.integers.dtype == float8.E4M3 and relative_error(quantized, applied, X) < 1e-3
    state = applied.state_dict()
    again = copy.deepcopy(applied)
    again.load_state_dict(state)
    integers = fxq.apply(toy(), fxq.quantize(toy(), [X], recipe(8), progress=False))
    with pytest.raises(RuntimeError, match="of another recipe"):
        integers.load_state_dict(state)
    with pytest.raises(RuntimeError, match="float weight or bias"):
        again.load_state_dict(toy().state_dict())


def test_other_weights_are_not_taken_for_those_that_were_quantized(bundle):
    with pytest.raises(fxq.ApplyError, match="steps from the bundle's integers"):
        fxq.apply(toy(seed=5), bundle)


def test_a_compiled_module_computes_it(quantized, bundle, monkeypatch, per_token):
    graphs = []
    monkeypatch.setattr(torch_compile, "compile_fx", lambda gm, inputs, **options: graphs.append(gm) or gm.forward)
    torch._dynamo.reset()
    model = toy()
    compiled = torch.compile(model, backend="fxq", options={"fxq.recipe": str(bundle)})
    with torch.no_grad():
        assert relative_error(quantized, compiled, X) < 1e-6
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    tail = "_per_token" * per_token
    assert sum(f"dual_scale_linear_fp8{tail}.default" in target for target in targets) == 2
    torch._dynamo.reset()


def test_a_split_over_ranks_is_refused(quantized):
    with pytest.raises(ParallelError, match=r"layer blocks.0.up is float8_e4m3fn: only integers are split over ranks"):
        _refuse_float8(plan for plan, _ in planned(quantized).values())


def test_the_plan_in_json_is_one_word(bundle):
    plan = json.loads((bundle / "manifest.json").read_text())["layers"]["blocks.0.up"]["plan"]
    assert plan["scheme"]["format"] == FLOAT8 and plan["scheme"]["weight_bits"] == 8
