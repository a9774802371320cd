import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxq.kernels.arguments import Operands
from fxq.kernels.gemm.gluon import HAS_GLUON, TABLE, launch_gluon
from fxq.kernels.gemm.op import dual_scale_linear, sample_operands

ROOT = Path(__file__).resolve().parents[3]


def operands(rows: int, outputs: int, width: int, split: int):
    random = torch.Generator().manual_seed(0)
    return sample_operands((rows, width), outputs, split, 8, random)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", TABLE, ids=lambda t: f"{t.block_m}x{t.block_n}")
@pytest.mark.parametrize("sizes", [(300, 200, 512, 384), (257, 129, 1024, 1024), (1000, 1536, 1536, 1440)])
def test_the_gpu_kernel_agrees_with_the_reference(sizes, tiles):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper device")
    arguments = operands(*sizes)
    moved = Operands(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments))
    got = launch_gluon(moved, torch.float32, tiles).cpu()
    want = dual_scale_linear.reference(*arguments, torch.float32)
    unit = float((arguments.input_scale[0] * arguments.weight_scale[0]).max())
    assert float((got - want).abs().max()) <= 0.5 * unit + 1e-5 * float(want.abs().max())


@pytest.mark.skipif(not HAS_GLUON, reason="this Triton has no Gluon")
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 8, 100, 64), "K = 100, split = 64: expected multiples of 16; use dual_scale_linear"),
        ((4, 8, 96, 50), "K = 96, split = 50: expected multiples of 16"),
    ],
)
def test_sizes_that_the_loads_cannot_take_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        launch_gluon(operands(*sizes), torch.float32)


@pytest.mark.skipif(not HAS_GLUON, reason="this Triton has no Gluon")
def test_packed_weights_are_refused():
    random = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"weight is torch.uint8 \(8, 48\): expected int8 \[N, K\]"):
        launch_gluon(sample_operands((4, 96), 8, 64, 4, random), torch.float32)


@pytest.mark.skipif(not HAS_GLUON, reason="this Triton has no Gluon")
def test_no_rows_give_an_empty_result():
    assert launch_gluon(operands(0, 8, 96, 64), torch.bfloat16).shape == (0, 8)


@pytest.mark.parametrize("missing", ["triton", pytest.param("triton.experimental.gluon", marks=pytest.mark.sweep)])
def test_the_module_imports_without_gluon_and_says_so(missing):
    code = f"""
import sys; sys.modules["{missing}"] = None
import torch, fxq.kernels.gemm.fp8
from fxq.kernels.arguments import Operands
from fxq.kernels.gemm.gluon import launch_gluon
x = torch.zeros(1, 16, dtype=torch.int8)
operands = Operands(x, x, torch.ones(1, 1), torch.ones(1), torch.ones(1), 16, 8)
try: launch_gluon(operands, torch.float32)
except ValueError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "this Triton has no Gluon for Hopper: use dual_scale_linear", done.stderr
