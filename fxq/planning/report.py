"""A plan for programs: JSON values, and the assumptions behind its numbers."""

from __future__ import annotations

import dataclasses

from fxq.planning.gpus import GIB
from fxq.planning.memory import activation_bytes, text_bytes
from fxq.planning.plan import RESERVE, TRAINED_FRAMES, VIDEOS, Plan, cache_name
from fxq.planning.workloads import ROTARY_FRAMES, TEMPORAL_STRIDE


def assumptions(plan: Plan) -> list[str]:
    """What the numbers rest on, one sentence each."""
    rates, w = plan.gpu.attainable, plan.workload
    fractions = ", ".join(
        f"{name} {low:.0%} to {high:.0%}"
        for name in ("bf16", "int8", "attention", "bandwidth")
        for low, high in [getattr(rates, name)]
    )
    lines = [
        "all numbers are estimates from shapes; nothing was loaded, run or measured",
        f"{plan.gpu.name} ({plan.gpu.arch}): peaks {plan.gpu.bf16:g} TFLOP/s bf16, {plan.gpu.int8:g} TOPS int8, "
        f"{plan.gpu.bandwidth:g} GB/s, attainable parts of them: {fractions} ({rates.note})",
        f"{w.steps} denoising and {w.context_calls} context calls per chunk of {w.frames_per_chunk} latent frames, "
        f"{w.tokens_per_frame} tokens each; {TEMPORAL_STRIDE} video frames per latent frame, {w.fps} per second",
        "speed is the denoiser's with one video: no text encoder, no VAE, no CUDA graphs at the slow end",
        "attention is bf16 in all rows; unpacking a quantized cache is not counted",
        f"usable memory leaves out {RESERVE / GIB:.1f} GiB for CUDA and the allocator and {plan.other / GIB:.1f} GiB "
        "for other things (--other-gib: text encoder and VAE, where they stay on the GPU)",
        "caches are written in place; attention reads one layer's whole cache as one "
        "bf16 copy, which counts as activations; videos at a time take turns",
        "caches int8, qvg and klt: exact bytes of these codecs (docs/cache.md), in spans of eight chunks or of as many "
        "as the window has room for; the sink, one recent chunk and what makes no span yet are bf16",
        f"quantizing is counted with a checkpoint directory and {VIDEOS} calibration videos of {TRAINED_FRAMES} latent "
        f"frames of this size, {cache_name(plan.window)}, on a CPU; fxq quantize says what its own data need before it "
        "starts",
        "every quantized layer is taken to have two scales; patch and time embedding, norms, modulation and head stay "
        "in bf16",
    ]
    if (frames := w.frames(plan.minutes)) > ROTARY_FRAMES:
        lines.append(f"{frames} latent frames are more than the {ROTARY_FRAMES} positions of the official code")
    return lines


def plan_to_json(plan: Plan) -> dict[str, object]:
    """JSON values: bytes, seconds and frames per second, all estimates, with the assumptions."""
    return {
        "kind": "estimate",
        "model": dataclasses.asdict(plan.workload),
        "gpu": {"name": plan.gpu.name, "arch": plan.gpu.arch, "memory": plan.gpu.memory, "usable": plan.usable},
        "minutes": plan.minutes,
        "weights": plan.weights,
        "quantizing": {name: {"ram": ram, "disk": disk} for name, (ram, disk) in plan.quantizing().items()},
        "text_cache": text_bytes(plan.workload.config),
        "activations": {
            cache_name(window): activation_bytes(plan.workload, plan.workload.frames(plan.minutes), window)
            for window in plan.windows
        },
        "cache": {
            name: [{"minutes": minutes, "bytes": size} for minutes, size in sizes]
            for name, sizes in plan.cache_over_time()
        },
        "fits": [dataclasses.asdict(fit) for fit in plan.fits()],
        "expected_speed": [dataclasses.asdict(speed) for speed in plan.speeds()],
        "expected_gain_of_w8a8_over_compiled_bf16": [
            {"moment": moment, "low": low, "high": high} for moment, (low, high) in plan.gains()
        ],
        "assumptions": assumptions(plan),
    }
