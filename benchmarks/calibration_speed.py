"""How long the presets' methods take for one layer beside the Adam loop of Q-ARVD, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.calibration_speed --out benchmarks/results/calibration_speed.json

Random weights and correlated inputs with outlier channels, W4A8 dual scale. Of the Adam loop ``--measured`` iterations
are timed, behind one that is not, and multiplied: its iterations take the same time.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import torch

from benchmarks.record import write
from fxq.core.method import LayerProblem, LayerUpdate, Scheme
from fxq.passes.methods import output_sqnr
from fxq.passes.methods.adaround import AdaRound
from fxq.presets import LEAST_ERROR

LAYERS = ((1536, 1536), (1536, 8960), (8960, 1536))
"""Inputs and outputs: the linears of Wan 1.3B."""


def make_problem(width: int, outputs: int, rows: int) -> LayerProblem:
    """A layer whose last 64 channels stand out."""
    generator = torch.Generator().manual_seed(width + outputs)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    x = draw(rows, width // 8) @ draw(width // 8, width) / (width / 8) ** 0.5 + 0.3 * draw(rows, width)
    weight = draw(outputs, width) / width**0.5
    for part in (x, weight):
        part[:, -64:] *= 6
    return LayerProblem(
        layer=f"{width}x{outputs}",
        weight=weight,
        low=x.amin(0),
        high=x.amax(0),
        rows=x,
        row_weights=torch.ones(rows),
        scheme=Scheme(weight_bits=4),
        split=width - 64,
        seed=0,
    )


def measure(width: int, outputs: int, rows: int, measured: int, iterations: int) -> dict[str, object]:
    """Seconds and output SQNR of both on one layer."""
    problem = make_problem(width, outputs, rows)
    update: LayerUpdate | None = None
    parts = {}
    for method in LEAST_ERROR:
        start = time.perf_counter()
        update = method.apply(problem, update)
        parts[type(method).__name__] = time.perf_counter() - start
    assert update is not None
    nearest = LEAST_ERROR[0].apply(problem, None)
    times = []
    for count in (1, 1 + measured):
        start = time.perf_counter()
        AdaRound(iterations=count).apply(problem, nearest)
        times.append(time.perf_counter() - start)
    loop = iterations * (times[1] - times[0]) / measured
    seconds = sum(parts.values())
    return {
        "inputs": width,
        "outputs": outputs,
        "rows": rows,
        "seconds": seconds,
        "seconds_by_method": parts,
        "adam_seconds": loop,
        "adam_iterations": iterations,
        "ratio": loop / seconds,
        "nearest_sqnr": output_sqnr(problem, nearest),
        "sqnr": output_sqnr(problem, update),
    }


def main() -> None:
    """Measure every layer, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=int, default=16384, help="calibration rows: what a recipe keeps at most")
    parser.add_argument("--measured", type=int, default=8, help="iterations of the Adam loop that are timed")
    parser.add_argument("--iterations", type=int, default=AdaRound().iterations)
    args = parser.parse_args()
    rows = []
    for width, outputs in LAYERS:
        rows.append(measure(width, outputs, args.rows, args.measured, args.iterations))
        row = rows[-1]
        print(f"{width} -> {outputs}: {row['seconds']:.1f} s, Adam {row['adam_seconds']:.0f} s, {row['ratio']:.1f}x")
    result = {
        "layers": rows,
    }
    write(args.out, result)


if __name__ == "__main__":
    main()
