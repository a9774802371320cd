"""The Triton kernels on a CPU, by Triton's interpreter.

Triton reads TRITON_INTERPRET when it decorates a kernel, so this file runs itself as a script in a process of its own
and every test below looks up the outcome of one case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxq import numerics

INF = float("inf")


def linear(m: int, n: int, k: int, split: int, bits: int, exact: bool, scattered: bool = False) -> None:
    """One product against exact integers (unit scales, integer ratios) or against float64 within half a unit."""
    from fxq.kernels import gemm
    from fxq.kernels.tiles import Tiles

    random = torch.Generator().manual_seed(m * n + k)
    low, high = numerics.integer_range(bits)
    groups = 1 if split == k else 2
    q = torch.randint(-128, 128, (m, k + 32), generator=random, dtype=torch.int8)[:, 32:]
    q = q if scattered else q.contiguous()
    w = torch.randint(low, high + 1, (n, k), generator=random, dtype=torch.int8)
    if exact:
        weight_scale = torch.ones(groups, n)
        weight_scale[1:] = torch.randint(1, 6, (groups - 1, n), generator=random).float()
        input_scale = torch.ones(groups)
        offset = torch.randint(-1000, 1000, (n,), generator=random).float()
    else:
        weight_scale = torch.rand(groups, n, generator=random) * 0.01 + 0.001
        input_scale = torch.rand(groups, generator=random) * 0.05 + 0.005
        offset = torch.randn(n, generator=random)
    unit = (input_scale.unsqueeze(1) * weight_scale).double()
    expected, magnitude = offset.double().expand(m, n), offset.double().abs().expand(m, n)
    for g, part in enumerate(numerics.group_slices(k, split)):
        product = (q[:, part].double() @ w[:, part].double().T) * unit[g]
        expected, magnitude = expected + product, magnitude + product.abs()
    assert not exact or bool((expected.abs() < 2**24).all())

    y = torch.full((m, n), float("nan"))
    stored = numerics.pack_int4(w) if bits <= 4 else w
    tiles = Tiles(32, 32, 64, warps=4, stages=2, group_m=2)
    gemm.launch(q, stored, weight_scale, input_scale, offset, split, bits, torch.float32, tiles=tiles, out=y)
    error = (y.double() - expected).abs()
    allowed = torch.zeros(n) if exact else 2**-22 * magnitude + (0.5 * unit[0] if groups == 2 else 0)
    assert bool((error <= allowed).all()), (
        f"largest error {error.max()}, everything written: {bool(y.isfinite().all())}"
    )


def rescale_of_large_integers() -> None:
    """Integers between 2**23 and 2**24 stay exact in the in-place rescale."""
    from fxq.kernels import gemm
    from fxq.kernels.tiles import Tiles

    q = torch.full((1, 192), 127, dtype=torch.int8)
    q[:, 0] = 0
    w = torch.full((2, 192), 127, dtype=torch.int8)
    w[0, 191] = 126
    scale = torch.tensor([[1.0, 1.0], [9.0, 9.0]])
    expected = 9.0 * torch.tensor([[127 * 127 * 63 + 127 * 126, 127 * 127 * 64]]) + torch.tensor(127.0 * 127 * 127)
    y = torch.full((1, 2), float("nan"))
    zero = torch.zeros(2)
    tiles = Tiles(16, 16, 64, warps=4, stages=2)
    gemm.launch(q, w, scale, torch.ones(2), zero, 128, 8, torch.float32, tiles=tiles, out=y)
    assert 2**23 < expected.max() < 2**24
    assert torch.equal(y, expected), (y, expected)


def quantize(x: Tensor, scale: list[float], zero_point: list[int], split: int, bits: int, gather: bool) -> None:
    """Bit-equal integers."""
    from fxq.kernels.quantize import launch

    perm = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(1)).to(torch.int32)
    order = perm if gather else torch.arange(x.shape[-1])
    scales, zeros = torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    expected = numerics.quantize_input(x[..., order], scales, zeros, split, bits)
    q = torch.full((x.numel() // x.shape[-1], x.shape[-1]), 99, dtype=torch.int8)
    result = launch(x, perm if gather else None, scales, zeros, split, bits, blocks=(4, 64), out=q)
    assert result.shape == x.shape
    assert torch.equal(result, expected), f"{int((result != expected).sum())} of {x.numel()} integers differ"


def noise(*shape: int) -> Tensor:
    """Float32 noise of a fixed seed, wide enough to clip."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 3


CASES: dict[str, Callable[[], None]] = {
    "linear-w8-single-exact": lambda: linear(37, 45, 200, 200, 8, exact=True),
    "linear-w8-dual-exact": lambda: linear(50, 70, 224, 160, 8, exact=True),
    "linear-w8-dual-odd-split-exact": lambda: linear(33, 31, 131, 101, 8, exact=True),
    "linear-w5-dual-narrow-exact": lambda: linear(1, 5, 40, 7, 5, exact=True),
    "linear-w8-rows-with-stride-exact": lambda: linear(34, 33, 96, 64, 8, exact=True, scattered=True),
    "linear-w4-single-exact": lambda: linear(37, 45, 224, 224, 4, exact=True),
    "linear-w4-dual-exact": lambda: linear(50, 70, 256, 160, 4, exact=True),
    "linear-w4-dual-narrow-outliers-exact": lambda: linear(3, 33, 96, 64, 4, exact=True),
    "linear-w2-dual-exact": lambda: linear(17, 20, 192, 32, 2, exact=True),
    "linear-w8-single": lambda: linear(40, 40, 150, 150, 8, exact=False),
    "linear-w8-dual": lambda: linear(65, 33, 224, 192, 8, exact=False),
    "linear-w6-dual": lambda: linear(33, 65, 100, 90, 6, exact=False),
    "linear-w4-dual": lambda: linear(33, 65, 224, 192, 4, exact=False),
    "linear-no-rows": lambda: linear(0, 5, 64, 32, 8, exact=False),
    "linear-rescale-of-large-integers": rescale_of_large_integers,
    "quantize-f32": lambda: quantize(noise(7, 130), [0.02], [5], 130, 8, gather=False),
    "quantize-f32-dual-gather": lambda: quantize(noise(6, 130), [0.02, 0.3], [5, -77], 97, 8, gather=True),
    "quantize-bf16-dual-gather": lambda: quantize(noise(2, 3, 96).bfloat16(), [0.011, 0.1], [-3, 0], 64, 8, True),
    "quantize-f16-4-bits": lambda: quantize(noise(5, 70).half(), [0.7, 0.2], [1, -8], 6, 4, gather=True),
    "quantize-ties": lambda: quantize(torch.arange(-150, 150).reshape(3, 100) / 4, [0.5, 0.25], [1, -2], 50, 6, False),
    "quantize-infinite": lambda: quantize(torch.tensor([[INF, -INF, 3e38, -3e38, 0.0]]), [1e-3], [100], 5, 8, False),
    "quantize-columns-with-stride": lambda: quantize(noise(64, 9).T, [0.03, 0.1], [0, 3], 32, 8, gather=True),
}


def main() -> None:
    """Run every case and print name -> traceback, empty where it passed, as the last line."""
    outcome = {}
    for name, case in CASES.items():
        try:
            case()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    print(json.dumps(outcome))


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    pytest.importorskip("triton", reason="Triton is not installed")
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel_agrees_with_the_reference(case: str, outcome: dict[str, str]) -> None:
    assert not outcome[case], outcome[case]


if __name__ == "__main__":
    main()
