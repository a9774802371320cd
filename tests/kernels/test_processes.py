"""Native kernels in forked processes and in several threads of Python at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fxq.kernels import dual_scale_linear, native, quantize_act
from fxq.kernels.gemm.op import sample_operands

ROOT = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(not native.ready(), reason=native.why_not() or "ready")

SETUP = """
import os, sys, torch
from fxq.kernels import OPS, attention, native, dual_scale_linear, quantize_act, quantize_per_token, rms_norm_rope
from fxq.kernels.gemm.op import sample_operands
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
x = torch.randn(1, 600, 512, generator=g)
operands = sample_operands((1, 600, 512), 512, 512, 8, g, panels=True)
k = torch.randn(1, 700, 4, 64, generator=g).bfloat16()

def work():
    q = quantize_act(x, None, torch.tensor([0.02]), torch.zeros(1).int(), 512, 8)
    y = dual_scale_linear(q, *operands[1:], torch.float32)
    pair = quantize_per_token(x, None, 512, 8)
    turned = rms_norm_rope(x, torch.ones(512), 1e-6, None, None, 4)
    attended = [attention(k, [k], [k])] if native.attends() else []  # torch's own does not run in a fork
    return [q, y, *pair, turned, *attended]

def same(a, b):  # without torch's threads, which a fork does not have
    return all(bytes(s.view(torch.uint8).numpy()) == bytes(t.view(torch.uint8).numpy()) for s, t in zip(a, b))

class Calls(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return same(work(), want)
"""


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SETUP + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
def fork(depth):
    child = os.fork()
    if not child:
        good = all(same(work(), want) for _ in range(3)) and torch.get_num_threads() == 2
        if depth > 1:
            good = fork(depth - 1) and good
        os._exit(0 if good else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@needs_native
def test_a_forked_process_computes_the_same_in_two_threads_and_its_own_forks_too():
    """Also where the parent had not called a kernel yet: torch's threads are of the same library."""
    code = FORK + "want = []; print(fork(1)); want = work(); print(fork(2), same(work(), want))"
    assert run(code).split() == ["True", "True", "True"]


@pytest.mark.sweep
@needs_native
@pytest.mark.any_cpu
def test_workers_of_a_data_loader_call_the_kernels():
    code = """
want = work()
loader = torch.utils.data.DataLoader(Calls(), num_workers=2, multiprocessing_context="fork")
print(all(bool(batch.all()) for batch in loader))
"""
    assert run(code).split() == ["True"]


@needs_native
def test_threads_of_python_call_the_kernels_at_once():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        random = torch.Generator().manual_seed(0)
        inputs = [torch.randn(300, 256, generator=random) for _ in range(6)]
        operands = sample_operands((300, 256), 320, 200, 8, random, panels=True)
        scale, zero = torch.tensor([0.02, 0.1]), torch.tensor([3, -4]).int()

        def call(x: torch.Tensor) -> torch.Tensor:
            q = quantize_act(x, None, scale, zero, 200, 8)
            return dual_scale_linear(q, *operands[1:], torch.float32)

        want = [call(x) for x in inputs]
        wrong: list[int] = []

        def repeat(i: int) -> None:
            torch.set_num_threads(2)
            wrong.extend(i for _ in range(30) if not torch.equal(call(inputs[i]), want[i]))

        threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong and not any(thread.is_alive() for thread in threads)
    finally:
        torch.set_num_threads(before)
