import dataclasses
import io
import json
import pathlib
import tomllib

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from fxq import cpu, kernels
from fxq.kernels import native
from fxq.kernels.gemm import op as gemm
from fxq.planning import doctor, gains
from fxq.planning.doctor import Diagnosis, check_op, diagnose, disagreement
from fxq.planning.environment import OPTIONAL, Device, read_environment
from fxq.planning.gains import cpu_gain, gpu_gain
from tests.planning.test_plan import invoke


@pytest.fixture(scope="module")
def diagnosis():
    return diagnose()


def broken(op, result):
    """The operator with another definition."""
    return dataclasses.replace(op, definition=result)


def test_every_operator_is_checked_and_right_here(diagnosis):
    assert diagnosis.ok
    assert {check.op for check in diagnosis.checks} == {op.name for op in kernels.OPS}
    assert {check.state for check in diagnosis.checks} <= {"ok", "unusable"}
    assert [check.kernel for check in diagnosis.checks if check.op == "dual_scale_linear"][1] == native.name()


def test_the_machine_is_described(diagnosis):
    machine = diagnosis.environment
    assert machine.torch == torch.__version__ and machine.cores >= 1
    assert set(machine.packages) >= {"triton", "diffusers", "onnxruntime", "torchao"}
    assert len(machine.lines()) == 9 and all(value for _, value in machine.lines())


def test_the_command_prints_tables_or_json_and_exits_zero():
    done = invoke("doctor")
    assert done.exit_code == 0 and "every operator is right" in done.output and "quantize_act" in done.output
    data = json.loads(invoke("doctor", "--json").output)
    assert data["ok"] and len(data["operators"]) >= len(kernels.OPS) and data["expected_gain"]["cpu"]


def test_the_command_exits_one_when_an_operator_is_wrong(monkeypatch):
    op = kernels.quantize_act
    wrong = broken(op, lambda *arguments: op.reference(*arguments) + 1)
    monkeypatch.setattr(kernels, "OPS", (wrong,))
    done = invoke("doctor")
    assert done.exit_code == 1 and "1 operators are wrong" in done.output
    done = invoke("doctor", "--json")
    found = json.loads(done.output)["operators"]
    assert done.exit_code == 1 and found[0]["state"] == "wrong" and "expected at most 0" in found[0]["note"]


@pytest.mark.parametrize(("built_for", "reason"), [(None, "is not built for CUDA"), ("13.0", "torch sees no GPU")])
def test_a_missing_gpu_is_no_error_and_its_reason_is_given(built_for, reason, monkeypatch):
    monkeypatch.setattr(kernels, "OPS", (kernels.quantize_act,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    found = diagnose()
    assert found.ok and reason in dict(found.gains)["a GPU"]
    assert [(check.device, check.state) for check in found.checks] == [("cpu", "ok"), ("cuda", "unusable")]
    assert reason in found.checks[1].note


def raise_runtime_error(*arguments):
    raise RuntimeError("no kernel image\nsecond line")


@pytest.mark.parametrize(
    ("op", "result", "state", "note"),
    [
        (kernels.attention, raise_runtime_error, "failed", "RuntimeError: no kernel image"),
        (kernels.attention, lambda q, k, v: q.flatten(2) * torch.nan, "wrong", "differs by nan"),
        (kernels.attention, lambda q, k, v: q.flatten(2).double(), "wrong", "returns torch.float64"),
        (kernels.attention, lambda q, k, v: q.flatten(2), "wrong", "differs by"),
    ],
    ids=["raises", "nan", "dtype", "values"],
)
def test_a_fault_is_described(op, result, state, note):
    (check,) = check_op(broken(op, result), "cpu")
    assert check.state == state and note in check.note and not check.healthy and check.error is None


def test_integers_that_follow_a_float_computation_may_differ_rarely_and_by_one():
    want = torch.zeros(1000, dtype=torch.int8)
    one, many, far = want.clone(), want + 1, want.clone()
    one[3], far[3] = 1, 2
    assert kernels.norm_quantize.max_error > 0 and not disagreement(kernels.norm_quantize, one, want)
    assert "100.0% of the integers differ" in disagreement(kernels.norm_quantize, many, want)
    assert "differs by 2" in disagreement(kernels.norm_quantize, far, want)
    assert "expected at most 0" in disagreement(kernels.quantize_act, one, want)


@pytest.mark.parametrize(("lacks", "dtype"), [("", torch.bfloat16), ("no instructions for it", torch.float32)])
def test_the_gain_of_a_cpu_is_that_of_a_linear_measured_in_its_own_dtype(lacks, dtype, monkeypatch):
    measured, threads = [], []

    def rounds(calls, device, count):
        threads.append(torch.get_num_threads())
        return [[0.5] * count, [0.25] * count, [1.0] * count]

    monkeypatch.setattr(native, "ready", lambda: True)
    monkeypatch.setattr(cpu, "no_bfloat16", lambda: lacks)
    monkeypatch.setattr(gains, "kernel_calls", lambda size, schemes: measured.append((size, schemes)))
    monkeypatch.setattr(gains, "rounds_in_turns", rounds)
    name = str(dtype).removeprefix("torch.")
    assert cpu_gain().startswith(
        f"W8A8 2.00x and W4A8 4.00x of {name}, a linear of 1560 x 1536 -> 1536 on one thread, measured now ("
    )
    ((size, schemes),) = measured
    assert threads == [1] and size.bias
    assert size.dtype == dtype and size.split == 1488 and schemes[-1] is None
    assert [scheme.label for scheme in schemes[:-1]] == ["W8A8", "W4A8"]


def test_without_native_kernels_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(native, "ready", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "there is no C++ compiler")
    (rows,) = check_op(kernels.norm_quantize, "cpu")
    assert rows.state == "ok" and rows.kernel == "eager" and rows.note == "there is no C++ compiler"
    portable, panels = check_op(kernels.dual_scale_linear, "cpu")
    assert portable.state == "ok" and panels.state == "unusable" and "compiler" in panels.note and panels.healthy
    monkeypatch.setattr(gains, "ON_CPU", "int_mm")
    assert "because there is no C++ compiler" in cpu_gain()
    monkeypatch.setattr(gains, "ON_CPU", gemm.IN_FLOAT)
    monkeypatch.setattr(kernels, "used", lambda name, device: gemm.IN_FLOAT)
    slow = "integers are multiplied in float32, which is exact and slower than the float model"
    assert cpu_gain().startswith("none, because this CPU") and slow in cpu_gain()
    assert slow in doctor.why_slow(kernels.dual_scale_linear, "cpu")


@pytest.mark.parametrize(
    ("capability", "op", "reason"),
    [
        ((7, 5), "dual_scale_linear", "needs sm_80, this GPU is sm_75"),
        ((8, 6), "quantize_fp8", "needs sm_89, this GPU is sm_86"),
    ],
)
def test_a_kernel_that_the_gpu_is_too_old_for_is_unusable_and_no_error(capability, op, reason, monkeypatch):
    monkeypatch.setattr(doctor, "HAS_TRITON", True)
    monkeypatch.setattr(kernels, "used", lambda name, device: "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    (check,) = check_op(next(found for found in kernels.OPS if found.name == op), "cuda:0")
    assert (check.state, check.note, check.healthy) == ("unusable", reason, True)


@pytest.mark.parametrize(
    ("device", "text"),
    [
        (Device("NVIDIA GeForce RTX 4090", "sm_89", 0), "over compiled bf16 (W8A8, 1.3B, middle of a 5 s video), not"),
        (Device("NVIDIA B200", "sm_100", 0), "none, because int8 has no fast path in Triton"),
        (Device("NVIDIA T4", "sm_75", 0), "none, because sm_75 is older than sm_80"),
        (
            Device("NVIDIA GeForce RTX 4060 Laptop GPU", "sm_89", 0),
            "unknown: NVIDIA GeForce RTX 4060 Laptop GPU is not",
        ),
    ],
)
def test_the_expected_gain_of_a_gpu_is_an_estimate_or_none_and_why(device, text, monkeypatch):
    monkeypatch.setattr(gains, "HAS_TRITON", True)
    assert text in gpu_gain(device)


@pytest.mark.parametrize(("installed", "reason"), [(None, "Triton is not installed"), ("yes", "for NVIDIA GPUs")])
def test_without_triton_no_gain_is_expected_on_any_gpu(installed, reason, monkeypatch):
    monkeypatch.setattr(gains, "HAS_TRITON", False)
    monkeypatch.setattr(gains, "triton", installed)
    assert reason in gpu_gain(Device("NVIDIA H200", "sm_90", 0))
    monkeypatch.setattr(kernels, "used", lambda name, device: "reference")
    assert reason in doctor.why_slow(kernels.quantize_act, "cuda:0")


def test_what_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr("fxq.planning.environment.compiler", lambda: None)
    monkeypatch.setattr("fxq.planning.environment._version", lambda package: None)
    lines = dict(read_environment().lines())
    assert lines["C++ compiler"] == "none: install g++ or set CXX"
    assert "onnxruntime (running ONNX files" in lines["not installed"]


def test_what_is_not_installed_is_named_with_the_extra_that_brings_it(monkeypatch):
    project = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {
        extra: {Requirement(line).name for line in lines} for extra, lines in project["optional-dependencies"].items()
    }
    assert all(package in extras[extra] for package, (extra, _) in OPTIONAL.items())
    monkeypatch.setattr("fxq.planning.environment._version", lambda package: None if package == "av" else "1")
    assert dict(read_environment().lines())["not installed"] == "pip install 'fxq[video]': av (videos as .mp4)"
    console = Console(width=200, file=io.StringIO())
    console.print(Diagnosis(read_environment(), (), ()))
    assert "│ pip install 'fxq[video]': av (videos as .mp4) " in console.file.getvalue()


def test_one_unhealthy_check_makes_the_diagnosis_bad(diagnosis):
    bad = dataclasses.replace(diagnosis.checks[0], state="failed")
    assert not Diagnosis(diagnosis.environment, (*diagnosis.checks, bad), ()).ok


@pytest.mark.gpu
def test_every_operator_is_right_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = diagnose()
    assert found.ok and any(check.device == "cuda:0" and check.kernel == "triton" for check in found.checks)
