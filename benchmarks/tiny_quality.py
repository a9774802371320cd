"""Scores and chunk sensitivity of the demo's bundles on many unseen prompts.

fxq demo --out out/demo
python -m benchmarks.tiny_quality --bundles out/demo --videos 256 --out benchmarks/results/tiny_quality.json
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

import torch

from benchmarks.record import write
from fxq.calibration.sensitivity import chunk_sensitivity
from fxq.demo.run import sensitivity_view
from fxq.export import load
from fxq.lab import Lab, tiny_rollout
from fxq.metrics import sprites
from fxq.metrics.latents import latent_mse, psnr
from fxq.models.tiny import load_tiny
from fxq.presets import PRESETS
from fxq.runtime.progress import Progress


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundles", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--videos", type=int, default=256)
    parser.add_argument("--seed", type=int, default=50)
    args = parser.parse_args()
    model = load_tiny()
    rollout, conditions = tiny_rollout(model, args.videos, seed=args.seed, unseen=True)
    with Progress() as bar:
        reference = torch.cat([rollout.rollout(c, d) for c, d in rollout.batches])
        scores = {"full precision": sprites.score(reference, conditions).means()}
        for bits in ("w8a8", "w4a8", "w4a6"):
            with bar.step(bits), rollout.using(load(args.bundles / bits)):
                video = torch.cat([rollout.rollout(c, d) for c, d in rollout.batches])
            scores[bits] = sprites.score(video, conditions).means() | {
                "latent_mse": float(latent_mse(video, reference).mean()),
                "psnr": float(psnr(video, reference).mean()),
            }
        lab = Lab(tiny_rollout(model, 16, seed=1, unseen=False)[0], PRESETS["w8a8"], bar)
        views = []
        for bits in ("w8a8", "w4a8"):
            with bar.step(f"{bits} sensitivity") as on_progress:
                views.append(
                    sensitivity_view(bits, chunk_sensitivity(rollout, lab.initialised(bits), None, on_progress))
                )
    result = {
        "videos": args.videos,
        "scores": scores,
        "sensitivity": [dataclasses.asdict(view) for view in views],
    }
    write(args.out, result)
    for name, row in scores.items():
        print(f"{name:<16}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    for view in views:
        print(view.bits, " ".join(f"{a:.4f}" for a in view.alpha))


if __name__ == "__main__":
    main()
