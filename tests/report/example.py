"""A made-up report in the shape of the demo's: the layers of the tiny model, rendered sprites with noise."""

from __future__ import annotations

import numpy as np
import torch

from fxq.metrics import sprites
from fxq.metrics.latents import paired_ratio
from fxq.report.data import Clip, Comparison, LayerView, Report, Running, SensitivityView, Variant

BITS = {"W8A8": 0.02, "W4A8": 0.2, "W4A6": 0.35}
CHUNKS = 7
PARTS = {
    "round to nearest": 1.0,
    "+ dual scale": 0.7,
    "+ reconstruction": 0.5,
    "+ reconstruction, weighting": 0.49,
    "+ all three (Q-ARVD)": 0.31,
}
PAIRS = (
    ("+ dual scale", "round to nearest"),
    ("+ reconstruction", "round to nearest"),
    ("+ reconstruction, weighting", "+ reconstruction"),
    ("+ all three (Q-ARVD)", "+ reconstruction"),
)


def variant(
    method: str, bits: str, error: float, videos: int, generator: np.random.Generator, drop: float = 0.0
) -> Variant:
    growth = np.linspace(0.3, 1.7, CHUNKS)
    chunk = error**2 * growth * generator.lognormal(0, 0.5, (videos, 1)) * generator.lognormal(0, 0.2, (videos, CHUNKS))
    latent = chunk.mean(1)
    return Variant(
        method=method,
        bits=bits,
        size_ratio=0.56 if bits == "W8A8" else 0.31,
        bytes=900_000,
        kept_bytes=100_000,
        latent_mse=latent,
        teacher_forced=latent * 0.1 * generator.lognormal(0, 0.1, videos),
        forced_chunks=chunk * 0.1,
        chunk_mse=chunk,
        psnr=10 * np.log10(4 / latent),
        ssim=1 - latent,
        scores={"shape": 0.97 - drop, "colour": 1.0 - drop / 2, "motion": 0.95 - 2 * drop, "exact_steps": 0.93 - drop},
        quantized=42,
        kept=4,
        seconds=3.2 if method == "MinMax" else 141.7,
    )


def compare(a: Variant, b: Variant, metric: str = "teacher_forced") -> Comparison:
    ratio, low, high = paired_ratio(getattr(a, metric), getattr(b, metric))
    return Comparison(
        metric=metric, bits=a.bits, a=a.method, b=b.method, ratio=ratio, low=low, high=high, videos=len(a.psnr)
    )


def both(a: Variant, b: Variant) -> list[Comparison]:
    return [compare(a, b, metric) for metric in ("teacher_forced", "latent_mse")]


def layers(generator: np.random.Generator) -> list[LayerView]:
    shapes = {"text_embedding.0": (96, 32), "text_embedding.2": (96, 96)}
    shapes |= {"time_embedding.0": (96, 64), "time_embedding.2": (96, 96), "time_projection.1": (576, 96)}
    for block in range(4):
        for attention in ("self_attn", "cross_attn"):
            shapes |= {f"blocks.{block}.{attention}.{name}": (96, 96) for name in "qkvo"}
        shapes |= {f"blocks.{block}.ffn.0": (384, 96), f"blocks.{block}.ffn.2": (96, 384)}
    shapes["head.head"] = (48, 96)
    views = []
    for name, (outputs, inputs) in shapes.items():
        if name.startswith(("time", "head")):
            views.append(
                LayerView(
                    layer=name,
                    quantized=False,
                    reason="time embedding: tiny and sensitive" if "time" in name else "prediction head: sensitive",
                    bits="-",
                    shape=(outputs, inputs),
                    outliers=0,
                    raw_outliers=0,
                    output_sqnr=None,
                    kernel="",
                )
            )
            continue
        large = int(generator.integers(0, 12)) if name.startswith("blocks") and not name.endswith("cross_attn.v") else 0
        norms = generator.normal(1.1, 0.06, inputs)
        norms[:large] *= generator.uniform(1.4, 4, large)
        median = float(np.median(norms))
        views.append(
            LayerView(
                layer=name,
                quantized=True,
                reason="",
                bits="W4A8",
                shape=(outputs, inputs),
                outliers=32 if large else 0,
                raw_outliers=large,
                output_sqnr=float(generator.normal(24, 3)),
                kernel="reference" if large else "torch._int_mm",
                norms=np.sort(norms)[::-1].astype(np.float32),
                median=median,
                threshold=1.27 * median,
            )
        )
    return views


def clips(variants: list[Variant], count: int, generator: np.random.Generator) -> list[Clip]:
    seeded = torch.Generator().manual_seed(0)
    conditions = sprites.sample_conditions(count, seeded, unseen=True)
    videos = sprites.render(conditions, seeded).permute(0, 1, 3, 4, 2).numpy()
    made = []
    for i in range(count):
        frames = {"Full precision": to_bytes(videos[i])}
        for v in variants:
            noise = np.repeat(np.sqrt(v.chunk_mse[i]), 3)[:, None, None, None] * generator.normal(size=videos[i].shape)
            frames[f"{v.method} {v.bits}"] = to_bytes(videos[i] + noise)
        errors = {f"{v.method} {v.bits}": tuple(v.chunk_mse[i].tolist()) for v in variants}
        made.append(Clip(prompt=sprites.describe(conditions[i]), frames=frames, chunk_mse=errors))
    return made


def to_bytes(video: np.ndarray) -> np.ndarray:
    return ((video.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def example_report(videos: int = 64, clip_count: int = 6) -> Report:
    generator = np.random.default_rng(0)
    variants = []
    for bits, error in BITS.items():
        variants.append(variant("MinMax", bits, error, videos, generator, 0.12 if bits == "W4A6" else 0.01))
        share = {"W8A8": 0.98, "W4A8": 0.55, "W4A6": 0.7}[bits]
        variants.append(variant("Q-ARVD", bits, error * share, videos, generator, 0.1 if bits == "W4A6" else 0.0))
    ablation = [variant(name, "W4A8", 0.2 * share**0.5, videos, generator) for name, share in PARTS.items()]
    by_name = {v.method: v for v in ablation}
    alpha = np.array([0.46, 0.2, 0.14, 0.09, 0.06, 0.035, 0.015])
    running = [Running(name="Full precision", seconds=0.08, weight_bytes=2_770_000, cache_bytes=1_610_000)]
    running.append(Running(name="Q-ARVD W8A8", seconds=0.05, weight_bytes=1_150_000, cache_bytes=1_610_000))
    return Report(
        title="Tiny autoregressive video model, quantized",
        command="fxq demo --out runs/demo --videos 64 --seed 1",
        environment={"fxq": "0.1.0", "torch": "2.13.0", "python": "3.11.9", "machine": "x86_64", "processor": "A CPU"},
        settings={
            "calibration_videos": 16,
            "evaluation_videos": videos,
            "iterations": 500,
            "seed": 1,
            "bits": ("w8a8", "w4a8", "w4a6"),
            "parameters": 715_000,
            "training": {"steps": 30000, "scores": {"shape": 0.97}},
        },
        full_precision={"shape": 0.97, "colour": 1.0, "motion": 0.953, "exact_steps": 0.93},
        variants=tuple(variants),
        ablation=tuple(ablation),
        comparisons=tuple(c for m, q in zip(variants[::2], variants[1::2], strict=True) for c in both(q, m)),
        ablation_comparisons=tuple(c for a, b in PAIRS for c in both(by_name[a], by_name[b])),
        sensitivity=tuple(
            SensitivityView(
                bits=bits,
                alpha=tuple(alpha**power / (alpha**power).sum()),
                low=tuple(0.85 * alpha**power / (alpha**power).sum()),
                high=tuple(1.15 * alpha**power / (alpha**power).sum()),
                videos=videos,
            )
            for bits, power in (("W8A8", 1.3), ("W4A8", 1.0), ("W4A6", 0.8))
        ),
        layers_of="Q-ARVD W4A8",
        layers=tuple(layers(generator)),
        clips=tuple(clips(variants, clip_count, generator)),
        frames_per_chunk=3,
        seconds={"total": 812.0},
        running=tuple(running),
    )
