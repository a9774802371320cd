"""Codecs of the key-value cache on the shipped model: reconstruction, free rollouts, long rollouts.

python -m benchmarks.kv_cache --out benchmarks/results/kv_cache.json
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

import numpy as np
import torch

from benchmarks.record import write
from fxq.cache.choose import KINDS, cache_tables, try_codec
from fxq.cache.codecs import Exact, Float8, Kivi, Klt, LowRank, PerChannel, PerToken, Prq, QuaRot
from fxq.cache.codecs.codec import Codec
from fxq.cache.policy import CachePolicy
from fxq.cache.store import Cache
from fxq.calibration.rollout import Draws
from fxq.lab import tiny_rollout
from fxq.metrics import sprites
from fxq.metrics.latents import bootstrap, latent_mse
from fxq.models.causal_wan import CausalWan
from fxq.models.self_forcing import SelfForcingRollout, SelfForcingState
from fxq.models.tiny import load_tiny
from fxq.runtime.progress import Progress

QVG = Prq(1, 16, block=32)
"""Quant VideoGen with as many centroids as spans of this model can carry, blocks of a head."""

RECONSTRUCTION: dict[str, Codec] = {
    "RTN per token 2b sym": PerToken(2),
    "RTN per token 2b asym B16": PerToken(2, 16, asymmetric=True),
    "RTN per channel 2b asym": PerChannel(2, 75),
    "RTN per channel 4b asym": PerChannel(4, 75),
    "KIVI 2b": Kivi(2, 75),
    "QuaRot 2b asym": QuaRot(2),
    "PRQ S1 2b sym (QVG)": QVG,
    "PRQ S1 2b asym": dataclasses.replace(QVG, asymmetric=True),
    "PRQ S2 2b sym": dataclasses.replace(QVG, stages=2),
    "PRQ S4 2b sym B16 (QVG-Pro)": dataclasses.replace(QVG, stages=4, block=16),
    "PRQ S1 4b sym": dataclasses.replace(QVG, bits=4),
    "mean + rank 4, 2b residual": LowRank(),
    "RTN per token 4b sym": PerToken(4),
    "FP8": Float8(),
    "INT8": PerToken(8, scale_dtype="bfloat16"),
    "KLT per video 0.5b": Klt(0.5, rank=12),
    "KLT per video 1b": Klt(1.0, rank=12),
    "KLT calibrated 0.5b": Klt(0.5, fit="model"),
    "KLT calibrated 1b": Klt(1.0, fit="model"),
    "KLT calibrated 2b": Klt(2.0, fit="model"),
    "KLT calibrated, heads together 1b": Klt(1.0, joint=True, fit="model"),
    "bfloat16": Exact(),
}
ROLLOUTS = (
    "RTN per token 2b sym",
    "RTN per token 2b asym B16",
    "QuaRot 2b asym",
    "KIVI 2b",
    "RTN per channel 2b asym",
    "RTN per token 4b sym",
    "PRQ S1 2b sym (QVG)",
    "PRQ S1 2b asym",
    "PRQ S2 2b sym",
    "KLT calibrated 0.5b",
    "KLT calibrated 1b",
    "KLT per video 0.5b",
    "KLT per video 1b",
    "FP8",
)
LONG = ("PRQ S1 2b sym (QVG)", "KLT calibrated 1b", "KLT per video 1b")


def run(
    model: CausalWan, videos: int, chunks: int, policy: CachePolicy, tables: Any = None
) -> tuple[SelfForcingState, torch.Tensor]:
    """The state after a rollout of unseen prompts, and the prompts."""
    rollout, conditions = tiny_rollout(model, videos, seed=2, unseen=True, batch=videos)
    (condition, draws), sampler = rollout.batches[0], dataclasses.replace(rollout.sampler, cache=policy)
    longer = Draws(draws.seeds, (sampler.frames_per_chunk * chunks, *draws.shape[1:]))
    rollout = SelfForcingRollout(model, [(condition, longer)], sampler, cache_tables=tables)
    state = rollout.begin(*rollout.batches[0])
    for _ in range(chunks):
        state = rollout.advance(state)
    return state, conditions


def calibration(model: CausalWan) -> Cache:
    """Exact caches of 16 prompts of the training split."""
    rollout, _ = tiny_rollout(model, 16, seed=101, unseen=False)
    state = rollout.begin(*rollout.batches[0])
    for _ in range(7):
        state = rollout.advance(state)
    return state.cache


def reconstruction(cache: Cache, learned: Cache, bar: Progress) -> dict[str, dict[str, float]]:
    """SQNR in dB and stored bits per element of spans of 6 chunks, mean over layers and videos."""
    span, rows = 6 * cache.layout.chunk * cache.layout.tokens, {}
    for name, codec in RECONSTRUCTION.items():
        with bar.step(name):
            tables = cache_tables(CachePolicy(keys=codec, values=codec), [learned])
            row: dict[str, float] = {}
            for kind in KINDS:
                trials = []
                for layer in range(len(cache.keys)):
                    x = cache.exact(kind, layer)
                    trials.append(try_codec(name, codec, x, kind, span, 1, tables[kind == "values"][layer]))
                row[f"{kind}_sqnr"] = float(np.mean([trial.sqnr for trial in trials]))
                row[f"{kind}_bits"] = float(np.mean([trial.bits for trial in trials]))
            rows[name] = row
    return rows


def later_chunks(cache: Cache) -> dict[str, float]:
    """SQNR on chunks 2 to 5 of a basis from chunks 0 and 1 less that of a basis from all six, keys and values."""
    chunk, found = cache.layout.chunk * cache.layout.tokens, {}
    for kind in KINDS:
        losses = []
        for layer in range(len(cache.keys)):
            x, codec = cache.exact(kind, layer)[:, : 6 * chunk], Klt(1.0)
            rest = x[:, 2 * chunk :]
            for first in (x[:, : 2 * chunk], x):
                _, memory = codec.encode(first, kind, {})
                back = codec.decode(codec.encode(rest, kind, memory)[0], kind)
                error = (back - rest).double().square().flatten(1).sum(1)
                losses.append(float(-10 * (error / rest.double().square().flatten(1).sum(1)).log10().mean()))
        found[kind] = float(np.mean(losses[0::2]) - np.mean(losses[1::2]))
    return found


def peak_ratio(got: torch.Tensor, want: torch.Tensor, first: int) -> np.ndarray[Any, Any]:
    """PSNR in dB (peak 2, nothing clamped) of each video from frame ``first`` on."""
    return 10 * np.log10(4 / np.maximum(latent_mse(got[:, first:], want[:, first:]), 1e-15))


def free_rollouts(model: CausalWan, videos: int, learned: Cache, bar: Progress) -> dict[str, dict[str, Any]]:
    """Seven chunks on caches encoded in spans of two, against exact caches, same prompts and noise."""
    exact, conditions = run(model, videos, 7, CachePolicy())
    rows: dict[str, dict[str, Any]] = {
        "exact": {"scores": sprites.score(exact.latents, conditions).means(), "bytes": exact.cache.nbytes()}
    }
    for name in ROLLOUTS:
        codec = RECONSTRUCTION[name]
        policy = CachePolicy(keys=codec, values=codec, span=2)
        with bar.step(name):
            state, _ = run(model, videos, 7, policy, cache_tables(policy, [learned]))
        psnr = peak_ratio(state.latents, exact.latents, 6)
        low, high = bootstrap(psnr)
        rows[name] = {
            "psnr": float(psnr.mean()),
            "interval": [float(low), float(high)],
            "worst": float(psnr.min()),
            "scores": sprites.score(state.latents, conditions).means(),
            "packed_bytes": state.cache.nbytes("packed"),
            "per_video": psnr.tolist(),
        }
    return rows


def long_rollouts(
    model: CausalWan, videos: int, chunks: int, learned: Cache, bar: Progress
) -> dict[str, dict[str, Any]]:
    """Window 21, sink 3, relative positions: scores of every tenth chunk, bytes at a half and at the end."""
    base, rows = CachePolicy(window=21, sink=3, positions="relative"), {}
    policies = {"exact": base}
    for name in LONG:
        codec = RECONSTRUCTION[name]
        policies[name] = dataclasses.replace(base, keys=codec, values=codec, span=2)
    for name, policy in policies.items():
        with bar.step(f"{chunks} chunks, {name}"):
            state, conditions = run(model, videos, chunks, policy, cache_tables(policy, [learned]))
            half, _ = run(model, videos, chunks // 2, policy, cache_tables(policy, [learned]))
        chunked = state.latents.unflatten(1, (chunks, -1))
        scores = [sprites.score(chunked[:, i], conditions).means() for i in range(chunks)]
        rows[name] = {
            "motion_by_chunk": [row["motion"] for row in scores],
            "scores": {key: float(np.mean([row[key] for row in scores])) for key in scores[0]},
            "bytes_half": half.cache.nbytes(),
            "bytes": state.cache.nbytes(),
            "moved_per_chunk": state.cache.moved / chunks,
        }
    return rows


def absolute_positions(model: CausalWan, videos: int, bar: Progress, chunks: int = 21) -> list[float]:
    """Motion score of each chunk on an exact cache of everything, with absolute positions."""
    with bar.step(f"{chunks} chunks, absolute positions"):
        state, conditions = run(model, videos, chunks, CachePolicy())
    chunked = state.latents.unflatten(1, (chunks, -1))
    return [sprites.score(chunked[:, i], conditions).means()["motion"] for i in range(chunks)]


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--long-videos", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=100)
    args = parser.parse_args()
    model, result = load_tiny(), {}
    with Progress() as bar:
        with bar.step("calibration"):
            learned = calibration(model)
        with bar.step("exact caches"):
            cache = run(model, 16, 7, CachePolicy())[0].cache
        result["reconstruction"] = reconstruction(cache, learned, bar)
        result["basis_of_two_chunks_less_that_of_six"] = later_chunks(cache)
        result["free_rollouts"] = free_rollouts(model, args.videos, learned, bar)
        result["absolute_positions_motion_by_chunk"] = absolute_positions(model, args.long_videos, bar)
        result["long_rollouts"] = long_rollouts(model, args.long_videos, args.chunks, learned, bar)
    head = {
        "videos": args.videos,
        "long_videos": args.long_videos,
        "chunks": args.chunks,
    }
    write(args.out, head | result)
    for name, row in result["reconstruction"].items():
        print(f"{name:<36} bits {row['keys_bits']:.2f}  K {row['keys_sqnr']:.1f} dB  V {row['values_sqnr']:.1f} dB")
    print("a basis of two chunks less that of six, dB:", result["basis_of_two_chunks_less_that_of_six"])
    for name, row in result["free_rollouts"].items():
        shown = f"{row['psnr']:.1f} {row['interval'][0]:.1f} to {row['interval'][1]:.1f} dB  " if "psnr" in row else ""
        print(f"{name:<36} {shown}" + "  ".join(f"{key} {value:.3f}" for key, value in row["scores"].items()))
    shown = " ".join(f"{value:.2f}" for value in result["absolute_positions_motion_by_chunk"])
    print(f"absolute positions, motion by chunk: {shown}")
    for name, row in result["long_rollouts"].items():
        print(f"{name:<36} {row['scores']}  bytes {row['bytes_half']} {row['bytes']}")


if __name__ == "__main__":
    main()
