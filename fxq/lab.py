"""One model quantized in many ways and measured side by side: what the demo and the benchmarks share."""

from __future__ import annotations

import dataclasses
import json
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
from fxq.core.ir import QuantGraph, Stage, planned
from fxq.core.method import LayerStatistics
from fxq.core.rows import Weighting
from fxq.core.summary import summary
from fxq.job import Job
from fxq.metrics import sprites
from fxq.metrics.latents import chunk_mse, forced_chunks, latent_mse, mean_of_calls, paired_ratio, psnr
from fxq.metrics.similarity import ssim
from fxq.models.causal_wan import CausalWan
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import CHUNK, TINY_SAMPLER
from fxq.passes.methods.ranges import RangeSearch
from fxq.presets import PRESETS, single_scale
from fxq.quantize import finish
from fxq.recipes import recipe_to_json
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


@dataclasses.dataclass(frozen=True)
class Collected:
    """Statistics of a model's layers, the hash of the data they are of, the seconds that took, and what else was found.

    ``found`` is of the whole graph, as :attr:`fxq.core.ir.QuantGraph.found`.
    """

    statistics: dict[str, LayerStatistics]
    data: str
    seconds: float
    found: dict[str, object]


class Lab:
    """One traced and calibrated model, quantized in many ways without tracing or calibrating again.

    Another calibration is run for a recipe that asks for other layers, other rows or gradients, or rewrites the graph
    before. ``bits`` below is a preset's name, or a recipe: what chunk sensitivities are measured with.
    """

    def __init__(self, calibration: Rollout, recipe: Recipe, bar: Progress, traced: QuantGraph | None = None) -> None:
        """Trace the rollout's denoiser and collect statistics of every linear that ``recipe`` quantizes.

        Presets by name share inputs as ``recipe`` does. A graph that another lab ``traced`` is not traced again.
        """
        self.calibration, self.bar, self.share_inputs = calibration, bar, recipe.share_inputs
        self.traced = self._trace() if traced is None else traced
        self._collected: dict[tuple[object, ...], Collected] = {}
        self._measured: dict[str, tuple[ChunkSensitivity, float]] = {}
        self.collected(recipe)

    def _trace(self) -> QuantGraph:
        args, shapes = self.calibration.example_call()
        with self.bar.step("trace"):
            return trace(self.calibration.denoiser, args, None, shapes)

    def _planned(self, recipe: Recipe) -> QuantGraph:
        graph = self.traced.fork()
        Job(recipe, self.bar).plan(graph)
        return graph

    def collected(self, recipe: Recipe) -> Collected:
        """The statistics that a recipe asks for."""
        graph = self._planned(recipe)
        layers = frozenset(layer for layer, (plan, _) in planned(graph.module).items() if plan.scheme is not None)
        gradients = recipe.chunk_weighting is Weighting.GRADIENT
        rewritten = tuple(repr(step) for step in recipe.transforms if step.needs < Stage.CALIBRATED)
        attention = recipe.attention and recipe.attention.scheme
        sample = recipe.share_inputs, recipe.rows_per_call, recipe.max_rows, recipe.all_rows
        key = layers, sample, gradients, rewritten, attention
        if key not in self._collected:
            start = time.perf_counter()
            data = Job(recipe, self.bar).calibrate(graph, self.calibration)
            self._collected[key] = Collected(graph.statistics, data, time.perf_counter() - start, graph.found)
        return self._collected[key]

    def _calibrated(self, recipe: Recipe) -> QuantGraph:
        graph = self._planned(recipe)
        collected = self.collected(recipe)
        graph.adopt(collected.statistics)
        graph.found |= collected.found
        return graph

    def _recipe(self, bits: str | Recipe) -> Recipe:
        return bits if isinstance(bits, Recipe) else dataclasses.replace(PRESETS[bits], share_inputs=self.share_inputs)

    def timed_sensitivity(self, bits: str | Recipe) -> tuple[ChunkSensitivity, float]:
        """Sensitivity on the calibration videos and the seconds that took; measured once for each first method."""
        # What it is measured with is not reconstructed, and gradients do not matter for it.
        recipe = self._recipe(bits)
        recipe = dataclasses.replace(recipe, methods=recipe.methods[:1], weighting=Weighting.UNIFORM.value)
        key = json.dumps(recipe_to_json(recipe) | {"name": ""}, sort_keys=True)
        if key not in self._measured:
            start = time.perf_counter()
            job = Job(recipe, self.bar, label=f"{recipe.name} ")
            measured = job.measure(self._calibrated(recipe), self.calibration, self.collected(recipe).data)
            self._measured[key] = measured, time.perf_counter() - start
        return self._measured[key]

    def sensitivity(self, bits: str | Recipe) -> ChunkSensitivity:
        """Sensitivity on the calibration videos, measured once for each first method."""
        return self.timed_sensitivity(bits)[0]

    def initialised(self, bits: str | Recipe) -> fx.GraphModule:
        """The model with searched ranges and round-to-nearest integers: what sensitivity is measured with."""
        recipe = self._recipe(bits)
        return Job(recipe, self.bar).initialised(self._calibrated(recipe)).module

    def quantized(self, recipe: Recipe, bits: str | Recipe) -> tuple[fx.GraphModule, float]:
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
        told = None if alpha is None else alpha.tolist()
        return finish(graph, recipe, self.collected(recipe).data, told, []), seconds


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
        "gradient": "squared gradient of each row",
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


def latents_of(rollout: Rollout) -> Tensor:
    """Latents of every video of the rollout by the module that runs, on the CPU, [V, F, C, H, W]."""
    return torch.cat([rollout.rollout(c, d).cpu() for c, d in rollout.batches])


def object_scores(videos: Tensor, conditions: Tensor) -> dict[str, float]:
    """The scorer's shares on videos [V, F, 3, 20, 20] of the sprite world, asked for by ``conditions`` [V, 7].

    Longer videos than those of the training are scored chunk by chunk, and the mean is taken: in the whole of one a
    single step that is missed puts the sprite off its track for the rest.
    """
    if videos.shape[1] <= sprites.FRAMES:
        return sprites.score(videos, conditions).means()
    chunks = [sprites.score(chunk, conditions).means() for chunk in videos.split(CHUNK, dim=1)]
    return {name: float(np.mean([scores[name] for scores in chunks])) for name in chunks[0]}


def evaluate(
    rollout: Rollout,
    conditions: Tensor | None,
    reference: Tensor,
    candidates: Sequence[Candidate],
    bar: Progress,
    limits: tuple[float, float] = (-1.0, 1.0),
) -> tuple[list[Variant], dict[str, Tensor]]:
    """Measure candidates free-running and teacher-forced; returns their rows and their videos by name.

    Args:
        rollout: prompts and noise.
        conditions: what the videos were asked to show, for the scorer of the sprite world; None: other videos.
        reference: :func:`latents_of` the rollout in full precision.
        candidates: quantized modules.
        bar: shows progress.
        limits: of latents, for PSNR and SSIM.
    """
    with bar.step("teacher-forced errors"):
        forced, calls = forced_chunks(rollout, {c.name: c.module for c in candidates})
    units = max(rollout.units(c, d) for c, d in rollout.batches)
    variants, videos = [], {}
    with bar.step("rollouts") as on_progress:
        for done, candidate in enumerate(candidates):
            on_progress(done, len(candidates))
            with rollout.using(candidate.module):
                video = latents_of(rollout)
            videos[candidate.name] = video
            facts = summary(candidate.module)
            kept = [row for row in facts.kept if row not in facts.others]
            variants.append(
                Variant(
                    method=candidate.method,
                    bits=candidate.bits.upper(),
                    size_ratio=facts.ratio,
                    bytes=sum(row.bytes for row in facts.quantized),
                    kept_bytes=sum(row.bf16_bytes for row in kept),
                    latent_mse=latent_mse(video, reference),
                    teacher_forced=mean_of_calls(forced[candidate.name], calls),
                    forced_chunks=forced[candidate.name],
                    chunk_mse=chunk_mse(video, reference, video.shape[1] // units),
                    psnr=psnr(video, reference, *limits),
                    ssim=ssim(video, reference, *limits),
                    scores={} if conditions is None else object_scores(video, conditions),
                    quantized=len(facts.quantized),
                    kept=len(kept),
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
