"""Where AMX cannot be had the next instruction set is taken, and one line says why."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
import types

import pytest

from fxq import cpu
from fxq.kernels import native
from fxq.kernels.native import build, permission
from fxq.planning import gains
from tests.features import library_for, needs

pytestmark = needs("native")


@pytest.fixture
def next_best(monkeypatch):
    """What this CPU gets without AMX; for the test it is taken to have it, and nothing was tried before."""
    if build.AMX not in build.SETS:
        pytest.skip("AMX is of x86")
    without = cpu.features() - set(build.AMX.needs) | set(build.AVX512.needs) & cpu.features()
    monkeypatch.setattr(build, "FAILED", {})
    monkeypatch.setattr(cpu, "features", lambda: without)
    found = build.instruction_set()
    monkeypatch.setattr(cpu, "features", lambda: without | set(build.AMX.needs))
    monkeypatch.setattr(build, "SETS", (build.AMX, found))
    assert build.instruction_set() is build.AMX
    return found


def test_a_system_that_refuses_is_named_with_its_own_words(monkeypatch):
    def syscall(number, request, feature):
        assert (number.value, request.value, feature.value) == (158, 0x1023, 18)
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: types.SimpleNamespace(syscall=syscall))
    said = permission.tiles_refused.__wrapped__()
    assert said == "Linux does not hand out the tile registers (Operation not permitted)"


def test_without_permission_the_next_set_is_taken_with_a_warning(next_best, monkeypatch):
    monkeypatch.setattr(build, "tiles_refused", lambda: "Linux does not hand out the tile registers (no)")
    expected = rf"no native amx kernels: Linux does not .* \(no\); the {next_best.kernel} kernels are used"
    with pytest.warns(RuntimeWarning, match=expected):
        library, reason = build.library.__wrapped__()
    assert library is not None and reason == "" and build.instruction_set() is next_best
    assert native.why_slower() == "no native amx kernels: Linux does not hand out the tile registers (no)"
    assert "no native amx kernels: Linux" in gains.cpu_gain()


TOO_OLD = """#!/bin/sh
case "$*" in
*--version*) echo old ;;
*-mamx*) echo "g++: error: unrecognized command-line option '-mamx-tile'" >&2; exit 1 ;;
*) while [ "$1" != -o ]; do shift; done; cp {library} "$2" ;;
esac
"""


def test_a_compiler_that_is_too_old_for_amx_builds_the_next_set(next_best, tmp_path, monkeypatch):
    built = build.build(build.compiler(), build.cache_folder(), next_best)
    monkeypatch.setattr(build, "tiles_refused", lambda: "")
    script = tmp_path / "old"
    script.write_text(TOO_OLD.format(library=built))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("FXQ_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot compile .* unrecognized command-line option '-mamx-tile'"):
        library, _ = build.library.__wrapped__()
    assert library is not None and build.instruction_set() is next_best


def test_where_no_set_can_be_built_nothing_is_used_and_nothing_is_remembered(next_best, monkeypatch):
    def refuse(target):
        raise RuntimeError(f"not {target.kernel}")

    monkeypatch.setattr(build, "load", refuse)
    reason = f"native kernels could not be built: not {next_best.kernel}"
    assert build.library.__wrapped__() == (None, reason) and build.FAILED == {} and build.why_slower() == ""


SMALL_STACK = """
import ctypes, json, warnings
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 4096)), None) == 0
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    from fxq.kernels import dual_scale_linear, native
    from fxq.kernels.gemm.op import sample_operands
    arguments = (*sample_operands((40, 96), 70, 64, 8, torch.Generator(), panels=True), torch.float32)
    assert torch.equal(dual_scale_linear(*arguments), dual_scale_linear.reference(*arguments))
print(native.name(), [str(w.message) for w in said if "tile" in str(w.message)])
"""


def test_a_process_that_linux_refuses_the_tiles_multiplies_without_them():
    """A signal stack that could not hold them is such a case."""
    library_for(build.AMX)
    done = subprocess.run([sys.executable, "-c", SMALL_STACK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "native ['no native amx kernels: Linux does not hand out the tile registers (No space"
    )
