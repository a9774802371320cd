"""What each part of Q-ARVD adds on the shipped model: Tables 3 and 4 of arXiv 2605.21072, with intervals.

    python -m benchmarks.ablation --out benchmarks/results/ablation.json

Several calibration seeds (other prompts, noise and rounding order) are pooled; every comparison is paired by video.
A finished seed is one file in ``--work``; a killed run resumes with the next seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

import numpy as np

from benchmarks.record import write
from fxq.lab import Candidate, Lab, ablation_recipes, evaluate, latents_of, tiny_rollout, weighting_recipes
from fxq.metrics.latents import paired_ratio
from fxq.models.tiny import load_tiny
from fxq.presets import PRESETS, with_iterations
from fxq.runtime.progress import Progress
from fxq.runtime.writable import whole_file


def run_seed(bits: str, seed: int, videos: int, iterations: int) -> dict[str, dict[str, list[float]]]:
    """Per-video errors of every variant under one calibration seed."""
    model = load_tiny()
    # The paper's methods quantize every layer on its own.
    preset = dataclasses.replace(PRESETS[bits], share_inputs=False)
    recipe = dataclasses.replace(with_iterations(preset, iterations), seed=seed)
    recipes = ablation_recipes(recipe) | {f"weights {k}": v for k, v in weighting_recipes(recipe).items()}
    with Progress(prefix=f"seed {seed} ") as bar:
        lab = Lab(tiny_rollout(model, 16, seed=seed, unseen=False)[0], preset, bar)
        rollout, conditions = tiny_rollout(model, videos, seed=100 + seed, unseen=True)
        reference = latents_of(rollout)
        candidates = []
        for name, chosen in recipes.items():
            module, seconds = lab.quantized(dataclasses.replace(chosen, name=name), bits)
            candidates.append(Candidate(method=name, bits=bits, module=module, seconds=seconds))
        variants, _ = evaluate(rollout, conditions, reference, candidates, bar)
    return {
        v.method: {"teacher_forced": v.teacher_forced.tolist(), "latent_mse": v.latent_mse.tolist()} for v in variants
    }


def main() -> None:
    """Run, pool and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/ablation"))
    parser.add_argument("--bits", default="w4a8", choices=sorted(PRESETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=500)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pooled: dict[str, dict[str, list[float]]] = {}
    for seed in args.seeds:
        file = args.work / f"{args.bits}-{seed}-{args.videos}-{args.iterations}.json"
        if not file.exists():
            errors = run_seed(args.bits, seed, args.videos, args.iterations)
            with whole_file(file) as part:
                part.write_text(json.dumps(errors), encoding="utf-8")
        for name, errors in json.loads(file.read_text(encoding="utf-8")).items():
            for metric, values in errors.items():
                pooled.setdefault(name, {}).setdefault(metric, []).extend(values)

    def row(name: str, base: str) -> dict[str, object]:
        result: dict[str, object] = {"variant": name, "against": base}
        for metric in ("teacher_forced", "latent_mse"):
            a, b = (np.array(pooled[n][metric]) for n in (name, base))
            ratio, low, high = paired_ratio(a, b)
            result[metric] = {"mean": float(a.mean()), "ratio": ratio, "low": low, "high": high}
        return result

    parts = [name for name in pooled if not name.startswith("weights ")]
    weights = [name for name in pooled if name.startswith("weights ")]
    result = {
        "bits": args.bits,
        "videos": len(next(iter(pooled.values()))["latent_mse"]),
        "seeds": args.seeds,
        "parts": [row(name, "+ reconstruction") for name in parts],
        "weightings": [row(name, "weights uniform") for name in weights],
    }
    write(args.out, result)
    for table in ("parts", "weightings"):
        for entry in result[table]:  # type: ignore[attr-defined]
            cells = [f"{entry['variant']:<42}"]
            for metric in ("teacher_forced", "latent_mse"):
                cell = entry[metric]
                cells.append(f"{cell['mean']:.3e} x{cell['ratio']:.3f} ({cell['low']:.3f}..{cell['high']:.3f})")
            print("  ".join(cells))


if __name__ == "__main__":
    main()
