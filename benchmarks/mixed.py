"""Mixed precision on the shipped model: budgets of weight bytes between uniform W4A8 and W8A8.

    OMP_NUM_THREADS=1 python -m benchmarks.mixed --out benchmarks/results/mixed.json

Several calibration seeds (other prompts and noise) are pooled; every comparison, with uniform W4A8 and with the
published Q-ARVD of these bits, is paired by video. Errors are of
unseen prompts: teacher-forced predictions, and latents of free-running videos; and teacher-forced predictions of the
calibration videos. A finished seed is one file in ``--work``; a killed run resumes with the next seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from benchmarks.record import write
from fxq.core.config import with_budget
from fxq.core.facts import Facts
from fxq.lab import Candidate, Lab, evaluate, latents_of, tiny_rollout
from fxq.metrics.latents import paired_ratio, teacher_forced
from fxq.models.tiny import load_tiny
from fxq.passes.choose_widths import FACT
from fxq.presets import PRESETS, with_iterations
from fxq.runtime.progress import Progress
from fxq.runtime.writable import whole_file

BASE = "uniform W4A8"
FAITHFUL = {f"Q-ARVD W4A8, {count} iterations": count for count in (500, 2000)}
"""The published method, as fxq demo and fxq compare are shown with it, and as its presets are."""
METRICS = ("teacher_forced", "latent_mse", "on_calibration_videos")


def run_seed(seed: int, videos: int, extra: list[float]) -> dict[str, dict[str, Any]]:
    """Per-video errors and sizes of every variant under one calibration seed."""
    model = load_tiny()
    base = dataclasses.replace(PRESETS["w4a8"], seed=seed)
    wide = dataclasses.replace(PRESETS["w8a8"], seed=seed, weighting=base.weighting)
    recipes = {BASE: base}
    recipes |= {f"+{part:.0%} weight bytes": with_budget(base, bits_per_weight=4 * (1 + part)) for part in extra}
    recipes["uniform W8A8, same weighting"] = wide
    published = dataclasses.replace(PRESETS["q_arvd-w4a8"], seed=seed)
    recipes |= {name: with_iterations(published, iterations) for name, iterations in FAITHFUL.items()}
    with Progress(prefix=f"seed {seed} ") as bar:
        lab = Lab(tiny_rollout(model, 16, seed=seed, unseen=False)[0], base, bar)
        rollout, conditions = tiny_rollout(model, videos, seed=100 + seed, unseen=True)
        reference = latents_of(rollout)
        candidates = []
        for name, recipe in recipes.items():
            module, seconds = lab.quantized(dataclasses.replace(recipe, name=name), recipe)
            candidates.append(Candidate(method=name, bits="mixed", module=module, seconds=seconds))
        variants, _ = evaluate(rollout, conditions, reference, candidates, bar)
        with bar.step("teacher-forced errors on the calibration videos"):
            seen = teacher_forced(lab.calibration, {c.method: c.module for c in candidates})
    result = {}
    for variant, candidate in zip(variants, candidates, strict=True):
        found: Any = Facts.of(candidate.module).others.get(FACT, {})
        result[variant.method] = {
            "teacher_forced": variant.teacher_forced.tolist(),
            "latent_mse": variant.latent_mse.tolist(),
            "on_calibration_videos": seen[variant.method].tolist(),
            "size_ratio_of_quantized": variant.size_ratio,
            "bytes": variant.bytes + variant.kept_bytes,
            "seconds": candidate.seconds,
            "chosen": {key: found[key] for key in ("bits_per_weight", "error", "gap") if key in found},
            "at_8_bits": [layer for layer, bits in found.get("layers", {}).items() if bits == 8],
            "frontier": found.get("frontier", []),
        }
    return result


def row(name: str, seeds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One variant, its errors pooled over seeds and compared with uniform widths and with the published method."""
    result: dict[str, Any] = {"variant": name}
    for metric in METRICS:
        a, *others = (np.concatenate([seed[n][metric] for seed in seeds]) for n in (name, BASE, *FAITHFUL))
        result[metric] = {"mean": float(a.mean())}
        for against, b in zip((BASE, *FAITHFUL), others, strict=True):
            ratio, low, high = paired_ratio(a, b)
            result[metric][f"over {against}"] = {"ratio": ratio, "low": low, "high": high}
    for key in ("size_ratio_of_quantized", "bytes", "seconds", "chosen", "at_8_bits"):
        result[key] = [seed[name][key] for seed in seeds]
    return result


def main() -> None:
    """Run, pool and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/mixed"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--extra", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    seeds = []
    for seed in args.seeds:
        file = args.work / f"{seed}-{args.videos}-{'-'.join(map(str, args.extra))}.json"
        if not file.exists():
            found = run_seed(seed, args.videos, args.extra)
            with whole_file(file) as part:
                part.write_text(json.dumps(found), encoding="utf-8")
        seeds.append(json.loads(file.read_text(encoding="utf-8")))
    rows = [row(name, seeds) for name in seeds[0]]
    budgets = [name for name in seeds[0] if seeds[0][name]["frontier"]]
    result = {
        "seeds": args.seeds,
        "videos_of_each_seed": args.videos,
        "variants": rows,
        "frontiers": [seed[budgets[0]]["frontier"] for seed in seeds] if budgets else [],
    }
    write(args.out, result)
    for entry in rows:
        cells = [f"{entry['variant']:<30} {entry['bytes'][0]:>8}"]
        for metric in METRICS:
            cell = entry[metric]
            ratios = [cell[f"over {against}"] for against in (BASE, *FAITHFUL)]
            words = ", ".join(f"x{r['ratio']:.3f} ({r['low']:.3f}..{r['high']:.3f})" for r in ratios)
            cells.append(f"{cell['mean']:.3e} {words}")
        print("  ".join(cells))


if __name__ == "__main__":
    main()
