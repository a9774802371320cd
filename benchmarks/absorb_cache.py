"""Layers of the shipped model that forget their history, with and without what takes its place.

python -m benchmarks.absorb_cache --out benchmarks/results/absorb_cache.json
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

import torch
from torch import Tensor

from benchmarks.record import write
from fxq.cache.absorb import Absorb
from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Draws
from fxq.capture.trace import trace
from fxq.core.pipeline import run_passes
from fxq.lab import tiny_rollout
from fxq.metrics import sprites
from fxq.metrics.latents import bootstrap
from fxq.models.self_forcing import SelfForcingRollout, SelfForcingState
from fxq.models.tiny import load_tiny
from fxq.passes import AbsorbCache
from fxq.runtime.progress import Progress

WARMUP, AFTER = 5, 3
POSITIONS = {
    "absolute": CachePolicy(sink=3),
    "relative": CachePolicy(sink=3, window=21, positions="relative"),
}
SETTINGS = {
    "map, half the layers": Absorb(warmup=WARMUP),
    "map per head": Absorb(warmup=WARMUP, form="per_head"),
    "map of rank 8": Absorb(warmup=WARMUP, form="low_rank", rank=8),
    "map, a quarter of the layers": Absorb(warmup=WARMUP, ratio=0.25),
    "map, three quarters": Absorb(warmup=WARMUP, ratio=0.75),
    "48 tokens per head": Absorb(warmup=WARMUP, tokens=48),
    "16 tokens per head": Absorb(warmup=WARMUP, tokens=16),
}


class Bench:
    """The model, its graph, and the videos that all settings share."""

    def __init__(self, videos: int) -> None:
        self.model, self.videos = load_tiny(), videos
        rollout, self.conditions = tiny_rollout(self.model, videos, seed=2, unseen=True)
        self.batch = rollout.batches[0]
        self.sampler = rollout.sampler
        args, shapes = rollout.example_call()
        self.graph = trace(self.model, args, None, shapes)

    def run(self, policy: CachePolicy, evict: bool = False) -> SelfForcingState:
        """Rollouts of the warm-up and the chunks after it; ``evict`` lets layers forget and puts nothing in place."""
        condition, draws = self.batch
        longer = Draws(draws.seeds, (3 * (WARMUP + AFTER), *draws.shape[1:]))
        sampler = dataclasses.replace(self.sampler, cache=policy)
        rollout = SelfForcingRollout(self.model, [(condition, longer)], sampler)
        module = run_passes(self.graph.fork(), (AbsorbCache(policy),)).module if policy.absorb else self.model
        state = rollout.begin(condition, longer)
        with rollout.using(module):
            for _ in range(WARMUP + AFTER):
                state = rollout.advance(state)
                if evict and state.absorption is not None:
                    maps = tuple(torch.zeros_like(found) for found in state.absorption.maps)
                    state = dataclasses.replace(state, absorption=dataclasses.replace(state.absorption, maps=maps))
        return state

    def row(self, state: SelfForcingState, whole: SelfForcingState) -> dict[str, object]:
        """What the chunks after the warm-up are like."""
        lo = 3 * WARMUP

        def decibels(x: Tensor) -> Tensor:
            return 10 * torch.log10(4 / x.double().square().flatten(1).mean(1))

        psnr = decibels((state.latents - whole.latents)[:, lo:])
        low, high = bootstrap(psnr.numpy())
        absorption = state.absorption
        return {
            "psnr": float(psnr.mean()),
            "interval": [float(low), float(high)],
            "worst": float(psnr.min()),
            "scores": sprites.score(state.latents[:, lo:], self.conditions).means(),
            "layers": [] if absorption is None else list(absorption.converted),
            "left": [] if absorption is None else [verdict.left for verdict in absorption.verdicts],
            "bytes": state.cache.nbytes() + (0 if absorption is None else absorption.nbytes),
        }


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--videos", type=int, default=64)
    args = parser.parse_args()
    bench, result = Bench(args.videos), dict[str, object]()
    with Progress() as bar:
        for name, plain in POSITIONS.items():
            with bar.step(f"{name}: whole history"):
                whole = bench.run(plain)
            rows: dict[str, object] = {}
            with bar.step(f"{name}: evicted"):
                first = dataclasses.replace(plain, absorb=Absorb(warmup=WARMUP))
                rows["evicted, half the layers"] = bench.row(bench.run(first, evict=True), whole)
            for label, settings in SETTINGS.items():
                with bar.step(f"{name}: {label}"):
                    rows[label] = bench.row(bench.run(dataclasses.replace(plain, absorb=settings)), whole)
            whole_scores = sprites.score(whole.latents[:, 3 * WARMUP :], bench.conditions).means()
            result[name] = {"whole": {"scores": whole_scores, "bytes": whole.cache.nbytes()}, "rows": rows}
    head = {
        "videos": args.videos,
        "warmup": WARMUP,
        "chunks_after": AFTER,
    }
    write(args.out, head | result)


if __name__ == "__main__":
    main()
