"""One linear by the integer kernels of every instruction set of this CPU, and in bfloat16 by torch, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.instruction_sets --out benchmarks/results/instruction_sets.json
    OMP_NUM_THREADS=1 python -m benchmarks.instruction_sets --sets "native avx_vnni" "native avx2" --bits 8 4 \
        --out benchmarks/results/instruction_sets_avx_vnni.json

Two scales, quantizing not counted, random weights. CPU time of one thread, medians of ratios over rounds in which the
contestants take turns in one process; results are checked against each other before. `fxq bench` measures whole layers.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import write
from fxq import cpu
from fxq.kernels import dual_scale_linear, native
from fxq.kernels.gemm.op import sample_operands
from fxq.kernels.native import build

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1560)
LAYERS = ((1536, 1536), (1536, 8960), (8960, 1536))
"""Inputs and outputs: layers of Wan 1.3B."""
OUTLIERS, LEAST_SECONDS = 48, 0.02


@contextmanager
def kernels_of(library: ctypes.CDLL) -> Iterator[None]:
    """The native kernels of one library in the place of those this CPU gets."""
    before = native.library
    native.library = lambda: (library, "")  # type: ignore[assignment]
    try:
        yield
    finally:
        native.library = before


def contestants(rows: int, width: int, outputs: int, bits: int = 8) -> dict[str, Callable[[], Tensor]]:
    """Calls that compute one linear each; ``bits`` are those of the weight."""
    random = torch.Generator().manual_seed(0)
    operands = sample_operands((rows, width), outputs, width - OUTLIERS, bits, random, panels=True)
    x = torch.randn(rows, width, generator=random).bfloat16()
    weight = torch.randn(outputs, width, generator=random).bfloat16()
    bias = torch.zeros(outputs, dtype=torch.bfloat16)

    def integers(library: ctypes.CDLL) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with kernels_of(library):
                return dual_scale_linear(*operands, torch.bfloat16)

        return call

    found = {target.kernel: integers(build.load(target)) for target in build.SETS if not cpu.missing(target.needs)}
    first, *others = (call() for call in found.values())
    if not all(torch.equal(first, other) for other in others):
        raise RuntimeError(f"the instruction sets differ for {rows} x {width} -> {outputs}")
    found["bf16 eager"] = lambda: F.linear(x, weight, bias)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        found["bf16 oneDNN, packed"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return found


def seconds(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """CPU time of a call by contestant and round; short calls are repeated, a first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    repeats: dict[str, int] = {}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(repeats.get(name, 1)):
                call()
            spent = (time.process_time() - start) / repeats.get(name, 1)
            if turn:
                taken[name].append(spent)
            else:
                call_again = time.process_time()
                call()
                repeats[name] = max(1, round(LEAST_SECONDS / max(1e-6, time.process_time() - call_again)))
    return taken


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--bits", type=int, nargs="+", default=(8,), help="of the weights")
    parser.add_argument("--sets", nargs="+", help="kernels to measure, in the place of all; the first is compared with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured: list[dict[str, object]] = []
    first = args.sets[0] if args.sets else native.name()
    for bits, (width, outputs), rows in itertools.product(args.bits, LAYERS, args.rows):
        calls = contestants(rows, width, outputs, bits)
        taken = seconds({name: calls[name] for name in args.sets or calls}, args.rounds)
        ratios = {
            name: statistics.median(t / mine for t, mine in zip(times, taken[first], strict=True))
            for name, times in taken.items()
        }
        shape = {"rows": rows, "width": width, "outputs": outputs, "bits": bits}
        measured.append(shape | {"seconds": taken, "over": ratios})
        print(
            f"{rows} x {width} -> {outputs}, W{bits}: {first} {statistics.median(taken[first]) * 1e3:.3f} ms; "
            f"times it: {', '.join(f'{name} {ratio:.2f}' for name, ratio in ratios.items())}",
            flush=True,
        )
    write(args.out, {"kernel": first, "linears": measured})


if __name__ == "__main__":
    main()
