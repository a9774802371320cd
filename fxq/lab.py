"""One model quantized in many ways and measured side by side: what the demo and the benchmarks share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from fxq.calibration.rollout import Draws, Rollout
from fxq.calibration.sensitivity import ChunkSensitivity
from fxq.capture.trace import trace
from fxq.core.config import Recipe
from fxq.core.ir import QuantGraph
from fxq.core.summary import summary
from fxq.job import Job
from fxq.metrics import sprites
from fxq.metrics.latents import chunk_mse, latent_mse, paired_ratio, psnr, teacher_forced
from fxq.models.causal_wan import CausalWan
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import CHUNK, TINY_SAMPLER
from fxq.passes.methods.ranges import RangeSearch
from fxq.quantize import finish
from fxq.recipes import PRESETS, single_scale
from fxq.report.data import Comparison, Variant
from fxq.runtime.progress import Progress

SHAPE = (sprites.FRAMES, 3, sprites.SIZE, sprites.SIZE)


def tiny_rollout(
    model: CausalWan, count: int, *, seed: int, unseen: bool, batch: int = 64
) -> tuple[SelfForcingRollout, Tensor]:
    """A rollout of ``count`` random prompts and their word indices int64 [count, 7].

    Args:
        model: the tiny model.
        count: number of videos.
        seed: of prompts and noise.
        unseen: prompts kept from training, or prompts of the training split.
        batch: videos per batch.
    """
    conditions = sprites.sample_conditions(count, torch.Generator().manual_seed(seed), unseen=unseen)
    seeds = [1000 * seed + i for i in range(count)]
    batches = [
        ({"prompt_embeds": sprites.prompt_embeds(conditions[i : i + batch])}, Draws(seeds[i : i + batch], SHAPE))
        for i in range(0, count, batch)
    ]
    return SelfForcingRollout(model, batches, TINY_SAMPLER), conditions


def frames_of(video: Tensor) -> NDArray[np.uint8]:
    """Pixels uint8 [F, H, W, 3] of one video [F, C, H, W] in -1..1."""
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


class Lab:
    """One traced and calibrated model, quantized in many ways without tracing or calibrating again."""

    def __init__(self, calibration: Rollout, recipe: Recipe, bar: Progress) -> None:
        """Trace the rollout's denoiser and collect statistics of every linear that ``recipe`` quantizes.

        Sensitivities and initialised models share inputs as ``recipe`` does.
        """
        self.calibration, self.bar, self.share_inputs = calibration, bar, recipe.share_inputs
        args, shapes = calibration.example_call()
        with bar.step("trace"):
            self.traced = trace(calibration.denoiser, args, None, shapes)
        prepared = self._planned(recipe)
        self.calibration_hash = Job(recipe, bar).calibrate(prepared, calibration)
        self.statistics = prepared.statistics
        self._measured: dict[str, ChunkSensitivity] = {}

    def _planned(self, recipe: Recipe) -> QuantGraph:
        graph = self.traced.fork()
        Job(recipe, self.bar).plan(graph)
        return graph

    def _calibrated(self, recipe: Recipe) -> QuantGraph:
        graph = self._planned(recipe)
        graph.adopt(self.statistics)
        return graph

    def _preset(self, bits: str) -> Recipe:
        return dataclasses.replace(PRESETS[bits], share_inputs=self.share_inputs)

    def sensitivity(self, bits: str) -> ChunkSensitivity:
        """Sensitivity on the calibration videos; measured once per bit width."""
        if bits not in self._measured:
            recipe = self._preset(bits)
            job = Job(recipe, self.bar, label=f"{bits} ")
            self._measured[bits] = job.measure(self._calibrated(recipe), self.calibration, self.calibration_hash)
        return self._measured[bits]

    def initialised(self, bits: str) -> fx.GraphModule:
        """The model with searched ranges and round-to-nearest integers: what sensitivity is measured with."""
        recipe = self._preset(bits)
        return Job(recipe, self.bar).initialised(self._calibrated(recipe)).module

    def quantized(self, recipe: Recipe, bits: str) -> tuple[fx.GraphModule, float]:
        """A frozen model and the seconds its methods, rewrite and freeze took."""
        alpha = None
        if recipe.chunk_weighting.needs_sensitivity:
            alpha = self.sensitivity(bits).alpha
        chunks = max(self.calibration.units(c, d) for c, d in self.calibration.batches)
        graph = self._calibrated(recipe)
        graph.chunk_weights = recipe.chunk_weighting.of_chunks(alpha, chunks)
        start = time.perf_counter()
        job = Job(recipe, self.bar, label=f"{recipe.name} ")
        job.choose_integers(graph)
        job.rewrite(graph)
        seconds = time.perf_counter() - start
        return finish(graph, recipe, self.calibration_hash, None if alpha is None else alpha.tolist(), []), seconds


def ablation_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """What each part adds alone (Table 3 of arXiv 2605.21072), by name; the last is the whole method."""
    nearest = dataclasses.replace(recipe, methods=(RangeSearch(),), weighting="uniform")
    uniform = dataclasses.replace(recipe, weighting="uniform")
    return {
        "round to nearest": single_scale(nearest),
        "+ dual scale": nearest,
        "+ reconstruction": single_scale(uniform),
        "+ reconstruction, weighting": single_scale(recipe),
        "+ reconstruction, dual scale": uniform,
        "+ all three (Q-ARVD)": recipe,
    }


def weighting_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Chunk weightings (Table 4 of arXiv 2605.21072) on the whole method, by name."""
    names = {
        "uniform": "uniform",
        "exponential": "2^-i",
        "reversed": "reversed",
        "single_scale_only": "measured, single-scale layers only",
        "sensitivity": "measured",
    }
    return {label: dataclasses.replace(recipe, weighting=key) for key, label in names.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A quantized module with the names it has in tables."""

    method: str
    bits: str
    module: fx.GraphModule
    seconds: float

    @property
    def name(self) -> str:
        """Method and bits."""
        return f"{self.method} {self.bits.upper()}"


def evaluate(
    rollout: SelfForcingRollout, conditions: Tensor, reference: Tensor, candidates: Sequence[Candidate], bar: Progress
) -> tuple[list[Variant], dict[str, Tensor]]:
    """Measure candidates free-running and teacher-forced; returns their rows and their videos by name."""
    with bar.step("teacher-forced errors"):
        forced = teacher_forced(rollout, {c.name: c.module for c in candidates})
    variants, videos = [], {}
    with bar.step("rollouts") as on_progress:
        for done, candidate in enumerate(candidates):
            on_progress(done, len(candidates))
            with rollout.using(candidate.module):
                video = torch.cat([rollout.rollout(c, d) for c, d in rollout.batches])
            videos[candidate.name] = video
            facts = summary(candidate.module)
            variants.append(
                Variant(
                    method=candidate.method,
                    bits=candidate.bits.upper(),
                    size_ratio=facts.ratio,
                    bytes=sum(row.bytes for row in facts.quantized),
                    latent_mse=latent_mse(video, reference),
                    teacher_forced=forced[candidate.name],
                    chunk_mse=chunk_mse(video, reference, CHUNK),
                    psnr=psnr(video, reference),
                    scores=sprites.score(video, conditions).means(),
                    quantized=len(facts.quantized),
                    kept=len(facts.kept) - len(facts.others),
                    seconds=candidate.seconds,
                )
            )
    return variants, videos


def compare(a: Variant, b: Variant) -> list[Comparison]:
    """Paired ratios of ``a`` to ``b`` in both errors."""
    rows = []
    for metric in ("teacher_forced", "latent_mse"):
        ratio, low, high = paired_ratio(getattr(a, metric), getattr(b, metric))
        rows.append(
            Comparison(
                metric=metric, bits=a.bits, a=a.method, b=b.method, ratio=ratio, low=low, high=high, videos=len(a.psnr)
            )
        )
    return rows
