"""What tests may ask of a machine, and what the closing summary says about what it does not have."""

from __future__ import annotations

import ctypes
import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch

from fxq import cpu
from fxq.cpu import no_bfloat16
from fxq.kernels import native
from fxq.kernels.native import build
from tests.machine import browser

ROOT = pathlib.Path(__file__).resolve().parents[1]


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Bit for bit; to 1e-5 without AVX512, where the sums of torch's products follow where memory begins."""
    torch.testing.assert_close(got, want, rtol=0, atol=0 if cpu.above_avx2() else 1e-5)


@dataclasses.dataclass(frozen=True)
class Feature:
    """What is tested only where the machine has it, and why this one does not, or ""."""

    title: str
    why_not: Callable[[], str]


def _no_attention() -> str:
    return native.why_not() or ("" if native.attends() else f"the {native.name()} kernels have no attention")


def _why_no(target: build.InstructionSet) -> str:
    """Why the kernels for an instruction set cannot be run here, or ""."""
    if lacking := ", ".join(cpu.missing(target.needs)):
        return f"this CPU lacks {lacking}" + (f", as {cpu.LIMIT}={cpu.limit()} says" if cpu.limit() else "")
    return native.why_not() or build.FAILED.get(target.kernel, "")


CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def _not_emulated() -> str:
    if absent := ", ".join(tool for tool in (CROSS_COMPILER, EMULATOR) if shutil.which(tool) is None):
        return f"no {absent}: apt-get install g++-aarch64-linux-gnu qemu-user"
    return ""


OF_SETS = {
    f"{found.kernel} kernels": Feature(f"the kernels {found.kernel!r}", partial(_why_no, found)) for found in build.SETS
}
FEATURES = {
    "native": Feature("native kernels", native.why_not),
    "attends": Feature("native attention", _no_attention),
    "vnni": Feature("integer products by instructions of the CPU", lambda: "" if cpu.has_vnni() else cpu.lacks()),
    "exact_bytes": Feature("bytes multiplied by other libraries", lambda: cpu.lacks() if cpu.saturates() else ""),
    "bfloat16": Feature("bfloat16 linears of oneDNN", no_bfloat16),
    "browser": Feature("the page of fxq play in a browser", browser.why_not),
    **OF_SETS,
    "emulated": Feature("the native kernels for AArch64, emulated", _not_emulated),
    "gpu": Feature("kernels on a GPU", lambda: "" if torch.cuda.is_available() else "torch sees no GPU"),
}


def needs(name: str) -> pytest.MarkDecorator:
    """Skips a test where the machine lacks a feature; the closing summary counts it."""
    reason = FEATURES[name].why_not()
    return pytest.mark.skipif(bool(reason), reason=f"needs {name}: {reason}")


def demand(name: str) -> None:
    """As :func:`needs`, inside a test of which some cases need the feature."""
    if reason := FEATURES[name].why_not():
        pytest.skip(f"needs {name}: {reason}")


def library_for(target: build.InstructionSet) -> ctypes.CDLL:
    """The native kernels for an instruction set, whether or not they are those this CPU gets; skips where it cannot."""
    if target not in build.SETS:
        pytest.skip(f"needs {target.kernel}: this is another architecture")
    demand(f"{target.kernel} kernels")
    return build.load(target)


def not_tested(skips: Iterable[str]) -> list[str]:
    """A line for every feature that is missing here.

    Args:
        skips: the reasons of skipped tests.
    """
    reasons, lines = list(skips), []
    for name, feature in FEATURES.items():
        if name in OF_SETS and native.why_not():
            continue  # said of all of them
        if why := feature.why_not():
            count = sum(f"needs {name}: " in reason for reason in reasons)
            lines.append(f"not tested: {feature.title} ({count} tests skipped): {why}")
    return lines
