"""Integer weights, an encoded cache and absorbed layers together, on the shipped model: quality, bytes and peak.

OMP_NUM_THREADS=1 python -m benchmarks.combined --out benchmarks/results/combined.json

Every row is one recipe: weights in floats or W4A8, keys and values exact or in ``Klt`` of one bit, no layer or half of
them without history. Videos are those of unseen prompts, longer than what the model was trained on; errors are against
the float model on exact caches, over the chunks in which every part is at work.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

import torch
from torch import Tensor, fx

import fxq
from benchmarks.live_bytes import LiveBytes
from benchmarks.record import write
from fxq.cache.absorb import Absorb
from fxq.cache.codecs import Klt
from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Draws
from fxq.capture.trace import trace
from fxq.core.pipeline import run_passes
from fxq.lab import tiny_rollout
from fxq.metrics import sprites
from fxq.metrics.latents import bootstrap
from fxq.models.self_forcing import SelfForcingRollout, SelfForcingState
from fxq.models.tiny import load_tiny
from fxq.passes.with_cache import cache_passes
from fxq.presets import PRESETS
from fxq.runtime.progress import Progress

CHUNKS, FROM = 12, 6
"""Length of the videos, and the first chunk that is compared: the warm-up of absorbed layers is over."""
PLAIN = CachePolicy(window=21, sink=3, positions="relative", span=2)
CODED = dataclasses.replace(PLAIN, keys=Klt(1.0), values=Klt(1.0))
ROWS = {
    "float": (None, PLAIN),
    "float, KLT 1 bit": (None, CODED),
    "float, half the layers absorbed": (None, dataclasses.replace(PLAIN, absorb=Absorb())),
    "W4A8": ("w4a8", PLAIN),
    "W4A8, KLT 1 bit": ("w4a8", CODED),
    "W4A8, KLT 1 bit, half the layers absorbed": ("w4a8", dataclasses.replace(CODED, absorb=Absorb())),
}


class Bench:
    """The model and the videos that all rows share."""

    def __init__(self, videos: int, calibration: int, bar: Progress) -> None:
        self.model, self.calibration, self.bar = load_tiny(), calibration, bar
        rollout, self.conditions = tiny_rollout(self.model, videos, seed=2, unseen=True)
        condition, draws = rollout.batches[0]
        self.batch = condition, Draws(draws.seeds, (3 * CHUNKS, *draws.shape[1:]))
        self.sampler = rollout.sampler
        self.example = rollout.example_call()

    def module(self, recipe: str | None, policy: CachePolicy) -> fx.GraphModule:
        """The model with these weights and this cache, as one graph."""
        if recipe is None:
            args, shapes = self.example
            return run_passes(trace(self.model, args, None, shapes), cache_passes(policy)).module
        videos, _ = tiny_rollout(self.model, self.calibration, seed=1, unseen=False)
        kept = policy if policy.packs or policy.absorb else None
        return fxq.quantize(
            self.model, videos, dataclasses.replace(PRESETS[recipe], cache=kept, seed=1), progress=False
        )

    def run(self, module: fx.GraphModule, policy: CachePolicy) -> tuple[SelfForcingState, int]:
        """Whole rollouts, and the most bytes that the last chunk's tensors have at a time."""
        rollout = SelfForcingRollout(self.model, [self.batch], dataclasses.replace(self.sampler, cache=policy))
        state = rollout.begin(*self.batch)
        with rollout.using(module):
            for _ in range(CHUNKS - 1):
                state = rollout.advance(state)
            with LiveBytes() as made:
                state = rollout.advance(state)
        return state, made.peak

    def row(self, name: str, whole: Tensor | None) -> tuple[dict[str, Any], Tensor]:
        """One row, and its latents; ``whole`` are the float model's on exact caches."""
        recipe, policy = ROWS[name]
        with self.bar.step(f"{name}: graph"):
            module = self.module(recipe, policy)
        with self.bar.step(f"{name}: videos"):
            state, peak = self.run(module, policy)
        later = state.latents[:, 3 * FROM :]
        result: dict[str, Any] = {
            "scores": sprites.score(later, self.conditions).means(),
            "weights": _linear_bytes(self.model, None if recipe is None else module),
            "cache": state.cache.nbytes() + (0 if state.absorption is None else state.absorption.nbytes),
            "peak_of_a_chunk": peak,
            "absorbed_layers": [] if state.absorption is None else list(state.absorption.converted),
        }
        if whole is not None:
            psnr = 10 * torch.log10(4 / (later - whole[:, 3 * FROM :]).double().square().flatten(1).mean(1))
            low, high = bootstrap(psnr.numpy())
            result |= {"psnr": float(psnr.mean()), "interval": [float(low), float(high)], "worst": float(psnr.min())}
        return result, state.latents


def _linear_bytes(model: torch.nn.Module, quantized: fx.GraphModule | None) -> int:
    """Bytes of all linears: in bfloat16, those that were quantized as they are stored."""
    floats = sum(2 * p.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters())
    rows = [] if quantized is None else fxq.summary(quantized).quantized
    return floats + sum(row.bytes - row.bf16_bytes for row in rows)


def main() -> None:
    """Measure, print a table of Markdown and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--calibration-videos", type=int, default=16)
    args = parser.parse_args()
    rows, whole = dict[str, dict[str, Any]](), None
    with Progress() as bar:
        bench = Bench(args.videos, args.calibration_videos, bar)
        for name in ROWS:
            rows[name], latents = bench.row(name, whole)
            whole = latents if whole is None else whole
    result = {
        "videos": args.videos,
        "calibration_videos": args.calibration_videos,
        "chunks": CHUNKS,
        "compared_from": FROM,
        "rows": rows,
    }
    write(args.out, result)
    print("| recipe | PSNR dB | worst video | motion | linears, kB | cache, MB | peak of a chunk, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        psnr = "-"
        if "psnr" in row:
            psnr = f"{row['psnr']:.1f} ({row['interval'][0]:.1f} to {row['interval'][1]:.1f})"
        worst = f"{row['worst']:.1f}" if "worst" in row else "-"
        print(
            f"| {name} | {psnr} | {worst} | {row['scores']['motion']:.3f} | {row['weights'] / 1e3:.0f} | "
            f"{row['cache'] / 1e6:.2f} | {row['peak_of_a_chunk'] / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
