"""The Triton kernels on a CPU, by Triton's interpreter.

Triton reads TRITON_INTERPRET when it decorates a kernel, so the cases run as a script in a process of its own and every
test below looks up the outcome of one.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.interpreted import CASES, OTHERS

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def outcome(others: bool) -> dict[str, str]:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted", *(["others"] if others else [])]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.sweep) if name in OTHERS else name for name in CASES]
)
def test_interpreted_kernel_agrees_with_the_reference(case: str) -> None:
    found = outcome(case in OTHERS)
    assert not found[case], found[case]
