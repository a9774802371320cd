"""One linear of 4-bit weights, two in a byte, beside the same integers in a byte each, by every instruction set.

    OMP_NUM_THREADS=1 python -m benchmarks.packed_weights --out benchmarks/results/packed_weights.json

Two scales, quantizing not counted, random weights. With up to 64 rows every call takes other weights, of 512 MB of
copies in turn. CPU time of one thread, medians of ratios over rounds in which the layouts take turns in one process;
results are compared before.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.instruction_sets import LAYERS, OUTLIERS, kernels_of, seconds
from benchmarks.record import write
from fxq import cpu
from fxq.kernels import dual_scale_linear
from fxq.kernels.arguments import Operands
from fxq.kernels.gemm.op import plain_weight, sample_operands
from fxq.kernels.gemm.panels import pack_panels
from fxq.kernels.native import build

ROWS = (1, 4, 16, 64, 256, 1560)
COLD_ROWS, COLD_BYTES = 64, 512 << 20
BITS = 4


def layouts(rows: int, width: int, outputs: int) -> dict[str, Callable[[], Tensor]]:
    """Calls that compute as many linears on weights in either layout."""
    random = torch.Generator().manual_seed(0)
    packed = sample_operands((rows, width), outputs, width - OUTLIERS, BITS, random, panels=True)
    wide = packed._replace(weight=pack_panels(plain_weight(packed), packed.split), bits=8)
    if not torch.equal(dual_scale_linear(*packed, torch.float32), dual_scale_linear(*wide, torch.float32)):
        raise RuntimeError(f"the layouts differ for {rows} x {width} -> {outputs}")
    count = max(1, COLD_BYTES // wide.weight.nbytes) if rows <= COLD_ROWS else 1
    found = {}
    for name, operands in (("packed", packed), ("int8", wide)):
        copies = [operands._replace(weight=operands.weight.clone()) for _ in range(count)]

        def call(copies: list[Operands] = copies) -> Tensor:
            *_, last = (dual_scale_linear(*each, torch.bfloat16) for each in copies)
            return last

        found[name] = call
    return found


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    libraries = {target.kernel: build.load(target) for target in build.SETS if not cpu.missing(target.needs)}
    measured: list[dict[str, object]] = []
    for (width, outputs), rows in itertools.product(LAYERS, args.rows):
        calls = layouts(rows, width, outputs)
        for kernel, library in libraries.items():
            with kernels_of(library):
                taken = seconds(calls, args.rounds)
            speed = statistics.median(a / b for a, b in zip(taken["int8"], taken["packed"], strict=True))
            shape = {"kernel": kernel, "rows": rows, "width": width, "outputs": outputs}
            measured.append(shape | {"seconds": taken, "speed over int8": speed})
            print(f"{rows} x {width} -> {outputs}, {kernel}: {speed:.2f} of the speed of int8", flush=True)
    write(args.out, {"linears": measured})


if __name__ == "__main__":
    main()
