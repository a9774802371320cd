"""The main job on the shipped model: quantize it in several ways, measure every way on unseen prompts, report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from fxq.config import Recipe
from fxq.graph import linear_sites
from fxq.ir import QuantGraph
from fxq.metrics import sprites
from fxq.metrics.latents import chunk_mse, latent_mse, paired_ratio, psnr, teacher_forced
from fxq.models.causal_wan import CausalWan
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import CHUNK, TINY_SAMPLER, load_tiny, tiny_facts
from fxq.passes import ApplyMethods, DetectOutliers, Freeze, LowerLinear, PlanLayers, detect_outliers
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.ranges import RangeSearch
from fxq.pipeline import run_passes
from fxq.progress import Progress
from fxq.quantize import calibrate_graph, environment, finish, measure
from fxq.recipes import PRESETS, minmax
from fxq.report.data import Clip, Comparison, LayerView, Report, SensitivityView, Variant
from fxq.rollout import Draws
from fxq.sensitivity import ChunkSensitivity, chunk_sensitivity, chunk_weights
from fxq.summary import summary
from fxq.trace import trace

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Size of the job: videos to calibrate and evaluate on, reconstruction iterations, seed and bit widths."""

    calibration_videos: int = 16
    evaluation_videos: int = 64
    iterations: int = 500
    seed: int = 1
    bits: tuple[str, ...] = ("w8a8", "w4a8", "w4a6")
    ablation_bits: str = "w4a8"
    clips: int = 6


class Lab:
    """One traced and calibrated model, quantized in many ways without tracing or calibrating again."""

    def __init__(self, model: CausalWan, settings: DemoSettings, bar: Progress) -> None:
        self.settings, self.bar = settings, bar
        self.calibration, _ = tiny_rollout(model, settings.calibration_videos, seed=settings.seed, unseen=False)
        args, shapes = self.calibration.example_call()
        with bar.step("trace"):
            self.traced = trace(model, args, None, shapes)
        prepared = self._planned(PRESETS[settings.bits[0]])
        self.calibration_hash = calibrate_graph(prepared, self.calibration, PRESETS[settings.bits[0]], None, bar)
        self.statistics = prepared.statistics
        self._measured: dict[str, ChunkSensitivity] = {}

    def _planned(self, recipe: Recipe) -> QuantGraph:
        graph = self.traced.fork()
        run_passes(graph, (PlanLayers(recipe), DetectOutliers()))
        return graph

    def _calibrated(self, recipe: Recipe) -> QuantGraph:
        graph = self._planned(recipe)
        graph.adopt(self.statistics)
        return graph

    def sensitivity(self, bits: str) -> ChunkSensitivity:
        """Sensitivity on the calibration videos; measured once per bit width."""
        if bits not in self._measured:
            recipe = PRESETS[bits]
            with self.bar.step(f"{bits} sensitivity") as on_progress:
                self._measured[bits] = measure(self._calibrated(recipe), self.calibration, recipe, on_progress)
        return self._measured[bits]

    def initialised(self, bits: str) -> fx.GraphModule:
        """The model with searched ranges and round-to-nearest integers: what sensitivity is measured with."""
        recipe = PRESETS[bits]
        graph = self._calibrated(recipe)
        run_passes(graph, (ApplyMethods(recipe.methods[:1]), LowerLinear()))
        return graph.module

    def quantized(self, recipe: Recipe, bits: str) -> tuple[fx.GraphModule, float]:
        """A frozen model and the seconds its methods, rewrite and freeze took."""
        alpha = None
        if recipe.weighting not in ("uniform", "exponential"):
            alpha = self.sensitivity(bits).alpha
        graph = self._calibrated(recipe)
        graph.chunk_weights = chunk_weights(alpha, sprites.FRAMES // CHUNK, recipe.weighting)
        start = time.perf_counter()
        with self.bar.step(recipe.name) as on_layer:
            methods = ApplyMethods(
                recipe.methods, recipe.weighting, recipe.seed, None, lambda _, done, total: on_layer(done, total)
            )
            run_passes(graph, (methods, LowerLinear(), Freeze()))
        seconds = time.perf_counter() - start
        return finish(graph, recipe, self.calibration_hash, None if alpha is None else alpha.tolist(), []), seconds


def _with_iterations(recipe: Recipe, iterations: int) -> Recipe:
    methods = tuple(
        dataclasses.replace(m, iterations=iterations) if isinstance(m, AdaRound) else m for m in recipe.methods
    )
    return dataclasses.replace(recipe, methods=methods)


def _single_scale(recipe: Recipe) -> Recipe:
    rules = tuple(
        r if r.scheme is None else dataclasses.replace(r, scheme=dataclasses.replace(r.scheme, dual_scale=False))
        for r in recipe.rules
    )
    return dataclasses.replace(recipe, rules=rules)


def ablation_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """What each part adds alone (Table 3 of arXiv 2605.21072), by name; the last is the whole method."""
    nearest = dataclasses.replace(recipe, methods=(RangeSearch(),), weighting="uniform")
    uniform = dataclasses.replace(recipe, weighting="uniform")
    return {
        "round to nearest": _single_scale(nearest),
        "+ dual scale": nearest,
        "+ reconstruction": _single_scale(uniform),
        "+ reconstruction, weighting": _single_scale(recipe),
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
                    kept=len(facts.kept),
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


def sensitivity_view(bits: str, measured: ChunkSensitivity) -> SensitivityView:
    """Sensitivities with bootstrap bounds over videos."""
    mse = measured.mse.numpy()
    generator = np.random.default_rng(0)
    index = generator.integers(len(mse), size=(2000, len(mse)))
    shares = mse[index].mean(1)
    shares /= shares.sum(1, keepdims=True)
    low, high = np.quantile(shares, (0.025, 0.975), axis=0)
    return SensitivityView(
        bits=bits.upper(),
        alpha=tuple(measured.alpha.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        videos=len(mse),
    )


def layer_views(module: fx.GraphModule, traced: QuantGraph) -> list[LayerView]:
    """Summary rows of a quantized module with the outlier rule's numbers from the float weights."""
    weights = {s.layer: s.weight(traced.module) for s in linear_sites(traced.module) if s.weight_name is not None}
    views = []
    for row in summary(module).rows:
        outliers = detect_outliers(weights[row.layer]) if row.quantized else None
        views.append(
            LayerView(
                layer=row.layer,
                quantized=row.quantized,
                reason=row.reason,
                bits=row.bits,
                shape=row.shape,
                outliers=row.outliers,
                raw_outliers=outliers.raw_count if outliers and row.outliers else 0,
                output_sqnr=row.output_sqnr,
                kernel=row.kernel,
                norms=None if outliers is None else outliers.norms.sort(descending=True).values.numpy(),
                median=outliers.median if outliers else 0.0,
                threshold=outliers.threshold if outliers else 0.0,
            )
        )
    return views


def frames_of(video: Tensor) -> NDArray[np.uint8]:
    """Pixels uint8 [F, H, W, 3] of one video [F, C, H, W] in -1..1."""
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def make_clips(
    conditions: Tensor, reference: Tensor, videos: Mapping[str, Tensor], variants: Sequence[Variant], count: int
) -> list[Clip]:
    """The first ``count`` evaluation videos in every version."""
    chunks = {f"{v.method} {v.bits}": v.chunk_mse for v in variants}
    clips = []
    for i in range(min(count, len(conditions))):
        frames = {"Full precision": frames_of(reference[i])} | {name: frames_of(v[i]) for name, v in videos.items()}
        errors = {name: tuple(chunks[name][i].tolist()) for name in videos}
        clips.append(Clip(prompt=sprites.describe(conditions[i]), frames=frames, chunk_mse=errors))
    return clips


def run_demo(settings: DemoSettings, command: str, progress: bool = True) -> tuple[Report, dict[str, fx.GraphModule]]:
    """Quantize the shipped model at every bit width with MinMax and Q-ARVD, measure, and ablate.

    Args:
        settings: size of the job.
        command: how it was called, for the report.
        progress: show progress bars on stderr.

    Returns:
        The report and the Q-ARVD modules by bit width.
    """
    start = time.perf_counter()
    model = load_tiny()
    with Progress(progress) as bar:
        lab = Lab(model, settings, bar)
        rollout, conditions = tiny_rollout(model, settings.evaluation_videos, seed=settings.seed + 1, unseen=True)
        with bar.step("full-precision videos"):
            reference = torch.cat([rollout.rollout(c, d) for c, d in rollout.batches])
        candidates, modules = [], {}
        for bits in settings.bits:
            recipe = _with_iterations(PRESETS[bits], settings.iterations)
            for method, chosen in (("MinMax", minmax(recipe)), ("Q-ARVD", recipe)):
                module, seconds = lab.quantized(chosen, bits)
                candidates.append(Candidate(method=method, bits=bits, module=module, seconds=seconds))
                modules[f"{method} {bits}"] = module
        bits = settings.ablation_bits
        parts = []
        for name, chosen in ablation_recipes(_with_iterations(PRESETS[bits], settings.iterations)).items():
            if name.endswith("(Q-ARVD)"):
                continue
            module, seconds = lab.quantized(dataclasses.replace(chosen, name=f"{bits} {name}"), bits)
            parts.append(Candidate(method=name, bits=bits, module=module, seconds=seconds))
        rows, videos = evaluate(rollout, conditions, reference, [*candidates, *parts], bar)
        variants, ablation = rows[: len(candidates)], rows[len(candidates) :]
        whole = next(v for v in variants if v.method == "Q-ARVD" and v.bits == bits.upper())
        ablation.append(dataclasses.replace(whole, method="+ all three (Q-ARVD)"))
        views = []
        for name in settings.bits:
            with bar.step(f"{name} sensitivity, unseen") as on_progress:
                measured = chunk_sensitivity(rollout, lab.initialised(name), None, on_progress)
            views.append(sensitivity_view(name, measured))
    comparisons = [c for m, q in zip(variants[::2], variants[1::2], strict=True) for c in compare(q, m)]
    by_name = {v.method: v for v in ablation}
    pairs = (
        ("+ dual scale", "round to nearest"),
        ("+ reconstruction", "round to nearest"),
        ("+ reconstruction, weighting", "+ reconstruction"),
        ("+ reconstruction, dual scale", "+ reconstruction"),
        ("+ all three (Q-ARVD)", "+ reconstruction"),
        ("+ all three (Q-ARVD)", "+ reconstruction, dual scale"),
    )
    shown = {name: video for name, video in videos.items() if any(name == c.name for c in candidates)}
    report = Report(
        title="Tiny autoregressive video model, quantized",
        command=command,
        environment=environment(),
        settings=dataclasses.asdict(settings)
        | {"parameters": sum(p.numel() for p in model.parameters()), "training": tiny_facts()},
        full_precision=sprites.score(reference, conditions).means(),
        variants=tuple(variants),
        ablation=tuple(ablation),
        comparisons=tuple(comparisons),
        ablation_comparisons=tuple(c for a, b in pairs for c in compare(by_name[a], by_name[b])),
        sensitivity=tuple(views),
        layers_of=f"Q-ARVD {bits.upper()}",
        layers=tuple(layer_views(modules[f"Q-ARVD {bits}"], lab.traced)),
        clips=tuple(make_clips(conditions, reference, shown, variants, settings.clips)),
        frames_per_chunk=CHUNK,
        seconds={"total": time.perf_counter() - start},
    )
    return report, {bits: modules[f"Q-ARVD {bits}"] for bits in settings.bits}
