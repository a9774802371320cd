"""Expected time of a denoiser call from peaks, attainable fractions and shapes: a range, never a measurement."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fxq.core.config import Recipe
from fxq.planning.gpus import Gpu, Range
from fxq.planning.memory import LinearCall, weight_bits
from fxq.planning.workloads import TEMPORAL_STRIDE, Workload
from fxq.presets import PRESETS

LAUNCH_SECONDS = 5e-6
INT4_RATE = (0.80, 1.0)
"""Rate of products with 4-bit weights, which are unpacked in the kernel, relative to 8-bit ones."""


@dataclass(frozen=True)
class Arithmetic:
    """One way to run the model.

    Attributes:
        name: as in tables.
        recipe: which linears are quantized, None for none.
        passes: reads and writes of a [tokens, dim] bf16 tensor per block outside linears and attention.
        launches: kernels per block; at the slow end they bound the time from below.
        int8_scores: whether attention's first product is of int8, as in ``fxq::attention_int8``.
    """

    name: str
    recipe: Recipe | None
    passes: int
    launches: int
    int8_scores: bool = False


EAGER = Arithmetic("bf16 eager", None, 149, 60)
COMPILED = Arithmetic("bf16 compiled", None, 19, 20)
W8A8 = Arithmetic("W8A8 optimized", PRESETS["w8a8"], 19, 20)
W4A8 = Arithmetic("W4A8 optimized", PRESETS["w4a8"], 19, 20)
W8A8_ATTENTION = Arithmetic("W8A8, int8 attention", PRESETS["w8a8"], 21, 26, int8_scores=True)
ARITHMETICS = (EAGER, COMPILED, W8A8, W4A8, W8A8_ATTENTION)
"""Passes counted in the official eager code, whose rotary embedding and norms make many temporaries, and when fused.

Attention in int8 makes codes of queries and new keys first; those of older keys are counted with the keys.
"""


@dataclass(frozen=True)
class CallSeconds:
    """Seconds of one call at one end of the range."""

    linears: float
    attention: float
    elementwise: float
    launches: float

    @property
    def total(self) -> float:
        """The sum of what the GPU does, or the launches where they take longer."""
        return max(self.linears + self.attention + self.elementwise, self.launches)


def call_seconds(
    workload: Workload, linears: Sequence[LinearCall], gpu: Gpu, arithmetic: Arithmetic, keys: int, end: int
) -> CallSeconds:
    """One denoiser call of a chunk.

    Args:
        workload: the model and its rollout.
        linears: from :func:`fxq.planning.memory.linear_calls`.
        gpu: peaks and fractions.
        arithmetic: how the model runs.
        keys: tokens attended to, the new ones included.
        end: 0 takes the low fractions, 1 the high ones.
    """
    config, rates = workload.config, gpu.attainable
    tokens, bandwidth = workload.chunk_tokens, gpu.bandwidth * 1e9 * rates.bandwidth[end]
    products = 4.0 * tokens * (keys + config.text_len) * config.dim
    moved = float(arithmetic.passes * tokens * config.dim * 2)
    if arithmetic.int8_scores:  # half of the products; keys are read in bf16 and written as bytes
        products *= 0.5 + 0.5 * (gpu.bf16 * rates.bf16[end]) / (gpu.int8 * rates.int8[end])
        moved += 3 * keys * config.dim
    return CallSeconds(
        linears=sum(_linear_seconds(call, gpu, arithmetic, end) for call in linears),
        attention=config.num_layers * products / (gpu.bf16 * 1e12 * rates.attention[end]),
        elementwise=config.num_layers * moved / bandwidth,
        launches=0.0 if end else config.num_layers * arithmetic.launches * LAUNCH_SECONDS,
    )


def _linear_seconds(call: LinearCall, gpu: Gpu, arithmetic: Arithmetic, end: int) -> float:
    bits, rates = weight_bits(arithmetic.recipe, call.layer, call.width), gpu.attainable
    rate = gpu.bf16 * rates.bf16[end] if bits == 16 else gpu.int8 * rates.int8[end]
    if bits == 4:
        rate *= INT4_RATE[end]
    operations = 2 * call.rows * call.width * call.outputs
    if not operations:
        return 0.0
    moved = call.width * call.outputs * bits / 8 + call.rows * (
        (2 if bits == 16 else 1) * call.width + 2 * call.outputs
    )
    return max(operations / (rate * 1e12), moved / (gpu.bandwidth * 1e9 * rates.bandwidth[end]))


def chunk_seconds(
    workload: Workload, linears: Sequence[LinearCall], gpu: Gpu, arithmetic: Arithmetic, keys: int
) -> Range:
    """Expected seconds (fast, slow) to generate a chunk, denoising and context calls, without VAE and text encoder."""
    fast, slow = (workload.calls * call_seconds(workload, linears, gpu, arithmetic, keys, end).total for end in (1, 0))
    return fast, slow


def frames_per_second(workload: Workload, seconds: Range) -> Range:
    """Expected video frames per second (low, high) of chunks that take ``seconds`` (fast, slow)."""
    frames = workload.frames_per_chunk * TEMPORAL_STRIDE
    return frames / seconds[1], frames / seconds[0]


def gain(workload: Workload, linears: Sequence[LinearCall], gpu: Gpu, keys: int) -> Range:
    """Expected speed-up (low, high) of W8A8 over compiled bf16.

    The fractions of bf16 linears, of int8 linears and of the rest vary independently; the rest has the same in both.
    """
    ends = (0, 1)
    base, better = (
        [call_seconds(workload, linears, gpu, arithmetic, keys, end) for end in ends] for arithmetic in (COMPILED, W8A8)
    )
    ratios = [
        dataclasses.replace(base[rest], linears=base[first].linears).total
        / dataclasses.replace(better[rest], linears=better[second].linears).total
        for first, second, rest in itertools.product(ends, repeat=3)
    ]
    return min(ratios), max(ratios)
