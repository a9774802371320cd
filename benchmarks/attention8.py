"""Attention in 8 bits: what it costs the shipped model's W8A8 in error, and its time beside exact attention.

    OMP_NUM_THREADS=1 python -m benchmarks.attention8 --out benchmarks/results/attention8.json

    OMP_NUM_THREADS=1 python -m benchmarks.attention8 --rounds 0 --seeds 1 --videos 32 --out FILE

Errors are teacher-forced, on prompts the model was not trained on, for several calibration seeds; with and without are
the same integers of linears, so they are compared video by video. Whole videos are compared with those of the float
model, with keys and values quantized in every call, and stored as integers when a chunk is done. Times are CPU times of
one thread, medians of rounds in which the contestants take turns; `FXQ_CPU=avx2`, or tests/machine/as_avx2 before the
command, holds a CPU to AVX2. No rounds: no times; no seeds: no errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import write
from fxq import kernels
from fxq.cache.codecs import Int8Attention
from fxq.cache.named import codecs_text
from fxq.cache.policy import CachePolicy
from fxq.core.facts import ChosenAttentions, Facts
from fxq.core.method import AttentionScheme
from fxq.kernels.arguments import AttentionPacked
from fxq.lab import tiny_rollout
from fxq.metrics.latents import paired_ratio, teacher_forced
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import load_tiny
from fxq.presets import PRESETS
from fxq.quantize import quantize

SHAPES = ((12, 520, 1560, 128), (12, 1560, 4680, 128), (12, 1560, 18720, 128), (12, 1560, 4680, 64), (4, 256, 1024, 64))
"""Heads, queries, keys, head_dim: chunks of 480p and smaller ones of Wan 1.3B with caches of some lengths."""


def errors(seeds: int, videos: int, scheme: str) -> dict[str, object]:
    """Teacher-forced errors of W8A8 without and with attention in 8 bits, their ratio, and what was chosen."""
    model, without, with_, layers = load_tiny(), [], [], []
    for seed in range(1, seeds + 1):
        calibration = tiny_rollout(model, 16, seed=seed, unseen=False)[0]
        exact = dataclasses.replace(PRESETS["w8a8"], seed=seed)
        made = {
            name: quantize(model, calibration, dataclasses.replace(exact, attention=attention), progress=False)
            for name, attention in (("exact", None), (scheme, AttentionScheme(scheme=scheme)))
        }
        found = teacher_forced(tiny_rollout(model, videos, seed=100 + seed, unseen=True)[0], made)
        without += found["exact"].tolist()
        with_ += found[scheme].tolist()
        chosen = ChosenAttentions.of(Facts.of(made[scheme]).others)
        assert chosen is not None
        layers.append(chosen.to_json())
    growth = sum(with_) / sum(without)
    ratio = paired_ratio(torch.tensor(with_).numpy(), torch.tensor(without).numpy())
    return {"exact": without, scheme: with_, "growth": growth, "paired_ratio": ratio, "chosen": layers}


def whole_videos(videos: int) -> dict[str, object]:
    """PSNR, in dB, of the latents of W8A8 to those of the float model: exact, in integers, and on stored integers."""
    model, policy = load_tiny(), CachePolicy(keys=Int8Attention(), values=Int8Attention(), span=2)
    calibration = tiny_rollout(model, 16, seed=1, unseen=False)[0]
    rollout = tiny_rollout(model, videos, seed=101, unseen=True)[0]
    (batch,) = rollout.batches
    exact = rollout.rollout(*batch)
    found: dict[str, object] = {}
    base = dataclasses.replace(PRESETS["w8a8"], seed=1)
    for name, scheme, cache in (
        ("exact", None, None),
        ("int8", AttentionScheme(), None),
        ("stored", AttentionScheme(), policy),
    ):
        module = quantize(model, calibration, dataclasses.replace(base, attention=scheme, cache=cache), progress=False)
        sampler = rollout.sampler if cache is None else dataclasses.replace(rollout.sampler, cache=cache)
        run = SelfForcingRollout(model, [batch], sampler)
        with run.using(module):
            latents = run.rollout(*batch)
        psnr = 10 * torch.log10(4 / (latents - exact).double().square().flatten(1).mean(1))
        found[name] = psnr.tolist()
        print(f"whole videos, attention {name}: {psnr.mean():.2f} dB, worst {psnr.min():.2f} dB")
    return found


def seconds(contestants: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median CPU time of each, in rounds of one call of each; a first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def stored(q: Tensor, k: Tensor, v: Tensor, old: int) -> AttentionPacked:
    """The call on a cache that holds the integers of the first ``old`` tokens, one span."""
    codec, packed = Int8Attention(), []
    for kind, x in (("keys", k), ("values", v)):
        record, _ = codec.encode(x[:, :old], kind, {})  # type: ignore[arg-type]
        packed.append([record.tensors[field.name] for field in record.fields])
    table = torch.zeros(old, q.shape[3] // 2, device=q.device)
    text = codecs_text(codec, codec, integers=True)
    return AttentionPacked(q, [k[:, old:]], [v[:, old:]], packed[0], packed[1], table, table, text, old)


def speeds(rounds: int) -> list[dict[str, object]]:
    """Times of every shape: torch in float32, and in both dtypes the exact operator, in integers, on stored ones."""
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for heads, queries, keys, size in SHAPES:
        random = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, n, heads, size, generator=random) for n in (queries, keys, keys))
        wide = [x.transpose(1, 2) for x in (q, k, v)]
        old = keys - min(queries, keys // 2)
        contestants: dict[str, Callable[[], Tensor]] = {
            "torch float32": lambda w=wide: F.scaled_dot_product_attention(*w)
        }
        for dtype in (torch.float32, torch.bfloat16):
            some = [x.to(dtype) for x in (q, k, v)]
            args = (some[0], list(some[1].split([old, keys - old], 1)), list(some[2].split([old, keys - old], 1)))
            for op in (kernels.attention, kernels.attention_int8):
                contestants[f"{op.name} {str(dtype).removeprefix('torch.')}"] = lambda op=op, args=args: op(*args)
            kept = stored(*some, old)
            name = f"stored integers {str(dtype).removeprefix('torch.')}"
            contestants[name] = lambda kept=kept: kernels.attention_packed(*kept)
        found = seconds(contestants, rounds)
        rows.append({"shape": [heads, queries, keys, size], "seconds": found})
        base = found["torch float32"]
        print(f"{heads} x {queries} x {keys} x {size}: " + ", ".join(f"{n} {base / s:.2f}x" for n, s in found.items()))
    return rows


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="of the times; 0: they are not measured")
    parser.add_argument(
        "--scheme", choices=sorted(kernels.ATTENTIONS), default="int8", help="whose errors are measured"
    )
    args = parser.parse_args()
    kernel = kernels.used(kernels.ATTENTIONS[args.scheme].name, "cpu")
    result: dict[str, object] = {"kernel": kernel, "speeds": speeds(args.rounds) if args.rounds else []}
    if args.seeds:
        found = errors(args.seeds, args.videos, args.scheme)
        result["errors"] = found
        print(
            f"{kernel}: error with {args.scheme} attention / without: {found['growth']}, paired {found['paired_ratio']}"
        )
        if args.scheme == "int8":
            result["whole_videos"] = whole_videos(args.videos)
    write(args.out, result)


if __name__ == "__main__":
    main()
