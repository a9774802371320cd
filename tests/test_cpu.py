"""What this CPU has, and what the switch takes away from it."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch

from fxq import cpu
from fxq.kernels.native import build
from tests import features

of_x86 = pytest.mark.skipif(cpu.ON_ARM, reason="the switch has other values on AArch64")


def fresh(code, **environment):
    """JSON that a new process prints, with no switch but those given."""
    settings = {cpu.LIMIT} | {name for variables in cpu.LIBRARIES.values() for name in variables}
    clean = {k: v for k, v in os.environ.items() if k not in settings}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


ALL = """
import json, torch, fxq
from fxq import cpu, kernels
from fxq.kernels import native
from fxq.kernels.gemm import op as gemm
from fxq.planning.environment import read_environment
a = torch.full((64, 64), 127, dtype=torch.int8)
torch._int_mm(a, a)
print(json.dumps({
    "features": sorted(cpu.features()), "torch": torch.backends.cpu.get_cpu_capability(), "why": native.why_not(),
    "linear": kernels.used("dual_scale_linear", "cpu"), "attention": kernels.used("attention", "cpu"),
    "panels": kernels.used("dual_scale_linear", "cpu", torch.zeros(1, 3, 64, 4, dtype=torch.int8)),
    "limited": read_environment().limited_to,
    "product": int(gemm.cpu_matmul(a, a)[0, 0]), "quantize": kernels.used("quantize_act", "cpu"),
}))
"""


@of_x86
@pytest.mark.sweep
def test_the_switch_takes_amx_from_every_library():
    found, verbose = fresh(ALL, FXQ_CPU="avx512", ONEDNN_VERBOSE="1")
    there = torch.cpu.get_capabilities()
    assert set(found["features"]) == {k for k, v in there.items() if v is True and not k.startswith("amx")}
    assert found["limited"] == "avx512" and found["product"] == 64 * 127 * 127
    assert found["panels"] != "native amx" and found["panels"] == found["quantize"].replace("eager", found["linear"])
    assert "isa:" in verbose or not there.get("avx512_vnni"), "oneDNN was to multiply, and to say how"
    assert "Advanced Matrix Extensions" not in verbose and "AMX" not in verbose


@of_x86
def test_the_switch_takes_everything_above_avx2_from_every_library():
    found, verbose = fresh(ALL, FXQ_CPU="avx2", ONEDNN_VERBOSE="1")
    assert not [name for name in found["features"] if name.startswith(("avx512", "avx_vnni", "amx"))]
    assert found["torch"] == "AVX2" and found["limited"] == "avx2"
    assert (found["linear"], found["product"]) == ("float32", 64 * 127 * 127)
    native = ("sdpa", "float32", "eager") if found["why"] else ("native avx2",) * 3
    assert (found["attention"], found["panels"], found["quantize"]) == native
    assert "isa:Intel AVX2" in verbose or "avx512" not in verbose


@of_x86
@pytest.mark.sweep
def test_the_switch_leaves_the_vnni_of_256_bits_to_every_library():
    found, verbose = fresh(ALL, FXQ_CPU="avx_vnni", ONEDNN_VERBOSE="1")
    assert not [name for name in found["features"] if name.startswith(("avx512", "amx"))]
    assert found["torch"] == "AVX2" and found["limited"] == "avx_vnni" and found["product"] == 64 * 127 * 127
    if torch.cpu.get_capabilities().get("avx_vnni") and not found["why"]:
        kernels = {found[name] for name in ("panels", "quantize", "attention")}
        assert (found["linear"], kernels) == ("int_mm", {"native avx_vnni"})
        assert "isa:Intel AVX2 with Intel DL Boost" in verbose


@of_x86
@pytest.mark.sweep
def test_the_portable_switch_leaves_everything_to_torch_which_is_limited_too():
    found, verbose = fresh(ALL, FXQ_CPU="portable", ONEDNN_VERBOSE="1")
    assert not [name for name in found["features"] if name.startswith(("avx", "fma", "amx"))]
    assert found["torch"] == "AVX2" and found["limited"] == "portable"
    assert "FXQ_CPU=portable takes away avx2, fma3" in found["why"]
    assert (found["linear"], found["panels"], found["quantize"]) == ("float32", "float32", "eager")
    assert found["product"] == 64 * 127 * 127
    assert "isa:Intel AVX2" in verbose or "avx512" not in verbose


@of_x86
def test_without_the_switch_everything_is_as_the_machine_has_it(monkeypatch):
    monkeypatch.delenv(cpu.LIMIT, raising=False)
    there = torch.cpu.get_capabilities()
    assert cpu.features() == {name for name, value in there.items() if value is True}
    assert cpu.has_vnni() == bool(there.get("avx512_vnni") or there.get("avx_vnni"))


LATE = """
import json, os, warnings, torch
torch.backends.cpu.get_cpu_capability()
os.environ["FXQ_CPU"] = "avx2"
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    import fxq
print(json.dumps([str(w.message) for w in found if "FXQ_CPU" in str(w.message)]))
"""


@of_x86
@pytest.mark.sweep
def test_a_switch_that_comes_too_late_for_torch_is_warned_of():
    found, _ = fresh(LATE)
    late = torch.cpu.get_capabilities().get("avx512_f", False)
    assert len(found) == late
    assert all("came after torch had started" in text and "ONEDNN_MAX_CPU_ISA=AVX2" in text for text in found)


@of_x86
@pytest.mark.parametrize("value", ["avx3", "sse", "amx"])
def test_an_unknown_value_is_refused_with_the_known_ones(value, monkeypatch):
    monkeypatch.setenv(cpu.LIMIT, value)
    with pytest.raises(
        ValueError,
        match=rf"FXQ_CPU='{value}': expected avx512, avx_vnni, avx2, portable, or unset for what this CPU has",
    ):
        cpu.features()


@of_x86
@pytest.mark.parametrize("value", ["", " ", "avx512", "avx_vnni", "avx2", "AVX2 ", "Portable"])
def test_the_switch_is_read_in_any_case_and_empty_is_unset(value, monkeypatch):
    monkeypatch.setenv(cpu.LIMIT, value)
    assert cpu.limit() == value.strip().lower()


@of_x86
def test_a_library_that_was_limited_by_hand_keeps_its_limit(monkeypatch):
    # What it writes must not reach the processes that later tests start.
    monkeypatch.setattr(os, "environ", {cpu.LIMIT: "avx2", "ONEDNN_MAX_CPU_ISA": "SSE41"})
    monkeypatch.delitem(sys.modules, "torch")
    cpu.limit_libraries()
    variables = {cpu.LIMIT: "avx2"} | cpu.LIBRARIES["avx2"] | {"ONEDNN_MAX_CPU_ISA": "SSE41"}
    assert os.environ == variables


@of_x86
def test_a_torch_without_a_list_of_capabilities_is_asked_one_by_one(monkeypatch):
    monkeypatch.delenv(cpu.LIMIT, raising=False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")  # one that is older still
    found = cpu._features.__wrapped__("")
    assert {"avx2", "fma3", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"} <= found and "avx512_f" not in found
    assert "avx512_vnni" not in cpu._features.__wrapped__("avx2")
    assert found - cpu._features.__wrapped__("avx512") == {"amx_tile", "amx_int8", "amx_bf16"}


# What Linux says of a Cortex-A72, a Neoverse N1 and what qemu calls "max".
HWCAPS = {
    (2299, 0): (None, "dot"),
    (1155067, 0): (build.DOTPROD, ""),
    (3976200187, 2139586559): (build.I8MM, ""),
}


@pytest.mark.parametrize("hwcaps", HWCAPS)
def test_what_linux_says_of_an_aarch64_cpu_chooses_its_kernels(hwcaps, monkeypatch):
    target, lacking = HWCAPS[hwcaps]
    as_aarch64(monkeypatch, hwcaps)
    monkeypatch.delenv(cpu.LIMIT, raising=False)
    assert build.instruction_set() is target
    assert build.missing() == (f"native kernels need a CPU with dot; this one lacks {lacking}" if lacking else "")


def as_aarch64(monkeypatch, hwcaps):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(cpu, "ON_ARM", True)
    monkeypatch.setattr(cpu, "LIMITS", cpu._LIMITS_OF_ARM)
    monkeypatch.setattr(cpu, "_hwcap", lambda: hwcaps)
    monkeypatch.setattr(cpu, "_features", cpu._features.__wrapped__)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"neon": True, "sve": False, "architecture": "aarch64"})
    monkeypatch.setattr(build, "SETS", build.ARCHITECTURES["aarch64"])
    monkeypatch.setattr(build, "FAILED", {})
    monkeypatch.delenv("FXQ_NATIVE", raising=False)
    monkeypatch.setattr(build, "compiler", lambda: "g++")


def test_the_switch_takes_the_instructions_of_an_aarch64_cpu_away(monkeypatch):
    as_aarch64(monkeypatch, (1 << 20, 1 << 13))
    monkeypatch.setenv(cpu.LIMIT, "dotprod")
    assert cpu.features() == {"neon", "dot"} and build.instruction_set() is build.DOTPROD
    monkeypatch.setenv(cpu.LIMIT, "portable")
    assert build.missing() == "native kernels need a CPU with dot; FXQ_CPU=portable takes away dot"
    monkeypatch.setenv(cpu.LIMIT, "avx2")
    with pytest.raises(ValueError, match="FXQ_CPU='avx2': expected dotprod, portable, or unset for what this CPU has"):
        cpu.features()


def test_the_values_of_the_switch_are_those_of_the_architecture(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.delenv(cpu.LIMIT, raising=False)
    there = runpy.run_path(cpu.__file__)
    assert set(there["LIMITS"]) == {"dotprod", "portable"} and there["MARCH"] == {}
    assert not any(there["LIBRARIES"].get(value) for value in there["LIMITS"])


def test_an_architecture_without_kernels_is_named(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    monkeypatch.setattr(build, "SETS", ())
    monkeypatch.delenv("FXQ_NATIVE", raising=False)
    assert build.missing().endswith("are for Linux on x86_64 and aarch64, this is Linux on riscv64")
    assert build.instruction_set() is None


@pytest.mark.parametrize(
    ("machine", "names", "saturates"),
    [
        ("x86_64", {"avx2"}, True),
        ("AMD64", {"avx2", "avx_vnni"}, False),
        ("x86_64", {"avx512_vnni"}, False),
        ("x86_64", {"avx512_f", "avx512_bw"}, True),
        ("aarch64", {"neon"}, False),
    ],
)
def test_x86_without_vnni_saturates_and_nothing_else(machine, names, saturates, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(cpu, "features", lambda: frozenset(names))
    assert cpu.saturates() == saturates


def test_no_other_module_asks_the_cpu_itself():
    root = features.ROOT
    files = [p for folder in ("fxq", "passes", "kernels", "export") for p in (root / folder).rglob("*.py")]
    asked = ("get_capabilities", "_is_vnni", "_is_avx", "_is_amx")
    asking = {p.resolve().name for p in files if any(word in p.read_text() for word in asked)}
    assert asking == {"cpu.py"}


SUMMARY = ["-q", "-p", "no:cacheprovider", "tests/kernels/test_native.py", "-k", "extreme or instructions"]


@of_x86
@pytest.mark.sweep
def test_the_closing_summary_says_which_kernels_were_not_tested():
    environment = os.environ | {cpu.LIMIT: "portable"}
    command = [sys.executable, "-m", "pytest", *SUMMARY]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=features.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()
    (native,) = (line for line in lines if line.startswith("not tested: native kernels (4 tests skipped)"))
    assert "native kernels need a CPU with avx2, fma3" in native
    assert any(line.startswith("not tested: bytes multiplied by other libraries (0 tests skipped)") for line in lines)
    assert "2 passed, 4 skipped" in lines[-1]


def test_a_machine_that_has_everything_says_nothing(monkeypatch):
    present = features.Feature("x", lambda: "")
    absent = features.Feature("y kernels", lambda: "not on this CPU")
    monkeypatch.setattr(features, "FEATURES", {"x": present, "y": absent})
    skips = ["Skipped: needs y: not on this CPU", "needs y: not on this CPU", "no diffusers"]
    assert features.not_tested(skips) == ["not tested: y kernels (2 tests skipped): not on this CPU"]
    monkeypatch.setattr(features, "FEATURES", {"x": present})
    assert features.not_tested(skips) == []
