"""The main job on the shipped model: quantize it in several ways, measure every way on unseen prompts, report."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor, fx

from fxq.calibration.sensitivity import ChunkSensitivity, chunk_sensitivity
from fxq.core.config import Recipe
from fxq.core.graph import linear_sites
from fxq.core.ir import QuantGraph
from fxq.core.summary import summary
from fxq.demo.running import measure_running
from fxq.demo.store import Finished
from fxq.environment import environment
from fxq.lab import Candidate, Lab, ablation_recipes, compare, evaluate, frames_of, latents_of, tiny_rollout
from fxq.metrics import sprites
from fxq.models.tiny import CHUNK, load_tiny, tiny_facts
from fxq.optimize import optimize
from fxq.passes import detect_outliers
from fxq.presets import PRESETS, minmax, with_iterations
from fxq.report.data import Clip, LayerView, Report, SensitivityView, Variant
from fxq.runtime.progress import Progress

PRESET = "Least error"
"""What the preset of a width is called in the report, after its methods."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Size of the job: videos to calibrate and evaluate on, reconstruction iterations, seed and bit widths.

    ``ablation_bits`` is the width at which Q-ARVD's parts are measured alone; "": they are not.
    """

    calibration_videos: int = 16
    evaluation_videos: int = 64
    iterations: int = 500
    seed: int = 1
    bits: tuple[str, ...] = ("w8a8", "w4a8", "w4a6")
    ablation_bits: str = "w4a8"
    clips: int = 6


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


def _quantized(
    settings: DemoSettings, lab: Lab, finished: Finished, on_progress: Callable[[int, int | None], None]
) -> tuple[list[Candidate], list[Candidate]]:
    """Every way at every width, and the parts of Q-ARVD alone at one."""
    wanted: list[tuple[str, str, Recipe]] = []
    for bits in settings.bits:
        preset, published = PRESETS[bits], with_iterations(PRESETS[f"q_arvd-{bits}"], settings.iterations)
        wanted += [("MinMax", bits, minmax(preset)), ("Q-ARVD", bits, published), (PRESET, bits, preset)]
    whole = len(wanted)
    if bits := settings.ablation_bits:
        for name, part in ablation_recipes(with_iterations(PRESETS[f"q_arvd-{bits}"], settings.iterations)).items():
            if not name.endswith("(Q-ARVD)"):
                wanted.append((name, bits, dataclasses.replace(part, name=f"{bits} {name}")))
    made = []
    for done, (name, bits, recipe) in enumerate(wanted):
        on_progress(done, len(wanted) + 1)  # measuring is the last
        module, seconds = finished.made(recipe, functools.partial(lab.quantized, recipe, bits))
        made.append(Candidate(method=name, bits=bits, module=module, seconds=seconds))
    on_progress(len(wanted), len(wanted) + 1)
    return made[:whole], made[whole:]


def run_demo(
    settings: DemoSettings, command: str, progress: bool = True, finished: Finished | None = None
) -> tuple[Report, dict[str, fx.GraphModule]]:
    """Quantize the shipped model at every bit width with MinMax, Q-ARVD and the preset, measure, and ablate Q-ARVD.

    Args:
        settings: size of the job.
        command: how it was called, for the report.
        progress: show progress bars on stderr.
        finished: modules of an earlier run that was killed, and where this one's go.

    Returns:
        The report and the modules of the presets by bit width.
    """
    start = time.perf_counter()
    model = load_tiny()
    with Progress(progress) as bar, bar.step("demo") as overall:
        calibration, _ = tiny_rollout(model, settings.calibration_videos, seed=settings.seed, unseen=False)
        lab = Lab(calibration, PRESETS[settings.bits[0]], bar)
        rollout, conditions = tiny_rollout(model, settings.evaluation_videos, seed=settings.seed + 1, unseen=True)
        with bar.step("full-precision videos"):
            reference = latents_of(rollout)
        candidates, parts = _quantized(settings, lab, finished or Finished(None, {}), overall)
        modules, bits = {f"{c.method} {c.bits}": c.module for c in candidates}, settings.ablation_bits
        shown_bits = bits or settings.bits[-1]
        rows, videos = evaluate(rollout, conditions, reference, [*candidates, *parts], bar)
        variants, ablation = rows[: len(candidates)], rows[len(candidates) :]
        if bits:
            whole = next(v for v in variants if v.method == "Q-ARVD" and v.bits == bits.upper())
            ablation.append(dataclasses.replace(whole, method="+ all three (Q-ARVD)"))
        views = []
        for name in settings.bits:
            with bar.step(f"{name} sensitivity, unseen") as on_progress:
                measured = chunk_sensitivity(rollout, lab.initialised(name), None, on_progress)
            views.append(sensitivity_view(name, measured))
        one, _ = tiny_rollout(model, 1, seed=settings.seed + 1, unseen=True)
        with bar.step("speed") as on_progress:
            running = [measure_running("Full precision", one)]
            for done, name in enumerate(settings.bits):
                on_progress(done + 1, len(settings.bits) + 1)
                fast = optimize(modules[f"{PRESET} {name}"], floats_where_faster=False)
                running.append(measure_running(f"{PRESET} {name.upper()}", one, fast))
    comparisons = []
    for plain, q_arvd, best in zip(variants[::3], variants[1::3], variants[2::3], strict=True):
        comparisons += [*compare(best, q_arvd), *compare(q_arvd, plain)]
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
        ablation_comparisons=tuple(c for a, b in pairs if bits for c in compare(by_name[a], by_name[b])),
        sensitivity=tuple(views),
        layers_of=f"{PRESET} {shown_bits.upper()}",
        layers=tuple(layer_views(modules[f"{PRESET} {shown_bits}"], lab.traced)),
        clips=tuple(make_clips(conditions, reference, shown, variants, settings.clips)),
        frames_per_chunk=CHUNK,
        seconds={"total": time.perf_counter() - start},
        running=tuple(running),
    )
    return report, {bits: modules[f"{PRESET} {bits}"] for bits in settings.bits}
