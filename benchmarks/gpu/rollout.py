"""A whole video at the model's size with random weights: caches and sampler included, the sampler's host work not.

Noise and rotary tables are made on the device before the timing, the same for all contestants.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fxq
from benchmarks.gpu.block import ALL_OPS, COMPILED_GRAPH, EAGER, compiler, mark_growing
from benchmarks.gpu.floats import COMPILED, CUDNN, NEEDS, attending, compiled_name
from benchmarks.gpu.graphs import replayed
from benchmarks.gpu.memory import memory_facts
from benchmarks.gpu.problems import Sizes
from benchmarks.gpu.recipes import DYNAMIC, INT8_ATTENTION, STATIC, ours_name, recipes
from benchmarks.gpu.session import Entry, Session
from fxq.bench import ours
from fxq.bench.contest import Built
from fxq.bench.problems import like_trained, open_gates
from fxq.bench.rollout import FRAMES, cast_args, in_dtype, last_call
from fxq.calibration.rollout import Draws
from fxq.models import self_forcing
from fxq.models.causal_wan import CausalWan, rope_tables
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout

BF16 = torch.bfloat16
CALIBRATED_CHUNKS = 2
LEAST = {"bfloat16": 25.0, "int8": 15.0}
"""dB of one call through 30 random blocks; operators are also compared with their references one by one."""


class DeviceDraws(Draws):
    """Draws made once and kept on a device."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int, int], device: str) -> None:
        super().__init__(seeds, shape)
        self._device = device
        self._made: dict[tuple[int, ...], Tensor] = {}

    def _normal(self, shape: Sequence[int], *key: int) -> Tensor:
        if key not in self._made:
            self._made[key] = super()._normal(shape, *key).to(self._device)
        return self._made[key]


Tables = Callable[..., tuple[Tensor, ...]]


def device_tables(device: str) -> Tables:
    """:func:`fxq.models.causal_wan.rope_tables` on a device, each table made once."""

    @functools.cache
    def made(*sizes: int) -> tuple[Tensor, ...]:
        return tuple(table.to(device) for table in rope_tables(*sizes))

    return made


def sampling_with(tables: Tables) -> contextlib.AbstractContextManager[Any]:
    """The sampler takes these rotary tables."""
    return mock.patch.object(self_forcing, "rope_tables", tables)


def make_rollout(sizes: Sizes, device: str) -> SelfForcingRollout:
    """One video through a bfloat16 model with random weights."""
    torch.manual_seed(0)
    config = sizes.config
    with torch.device(device):
        model = CausalWan(config).eval().requires_grad_(False)
        condition = {"prompt_embeds": torch.randn(1, config.text_len, config.text_dim)}
    like_trained(model)
    open_gates(model)
    _, height, width = config.patch_size
    shape = (FRAMES * sizes.chunks, config.in_dim, height * sizes.grid[0], width * sizes.grid[1])
    sampler = SamplerConfig(steps=sizes.steps, frames_per_chunk=FRAMES)
    return SelfForcingRollout(model.to(BF16), [(condition, DeviceDraws([1], shape, device))], sampler)


def beginning(rollout: SelfForcingRollout, chunks: int) -> SelfForcingRollout:
    """The same model on a shorter video."""
    condition, draws = rollout.batches[0]
    _, channels, height, width = draws.shape
    short = Draws(draws.seeds, (FRAMES * chunks, channels, height, width))
    return SelfForcingRollout(rollout.model, [(condition, short)], rollout.sampler)


@dataclasses.dataclass(frozen=True)
class Video:
    """A rollout, and the call of its last chunk on which contestants are compared."""

    rollout: SelfForcingRollout
    probe: tuple[Any, ...]
    tables: Tables
    device: str

    def built(self, run: Callable[..., Any], **more: Any) -> Built:
        """A contestant whose denoiser is ``run``."""

        def call() -> Tensor:
            with sampling_with(self.tables), self.rollout.using(run):
                return self.rollout.rollout(*self.rollout.batches[0])

        return Built(call, output=lambda: run(*self.probe)[0], **more)

    def compiled(self, dry: bool, attention: str) -> Callable[..., Any]:
        """The denoiser with each block compiled; blocks share their code, so one compilation serves all."""
        model = in_dtype(self.rollout, BF16).model
        for block in model.blocks:
            block.compile(backend=compiler(dry))

        def run(*args: Any) -> Any:
            mark_growing((*args[5], *args[6]))
            with attending(attention):
                return model(*args)

        return run

    def quantized(self, recipe: str) -> Built:
        """Quantized on the first chunks, optimized, one CUDA graph per cache length."""
        module = ours.optimized(self.rollout.model, beginning(self.rollout, CALIBRATED_CHUNKS), recipes()[recipe])
        checked = ours.finish(module, self.probe, self.device, lambda: None)
        memory = memory_facts(module, self.built(module).call, self.rollout) if recipe == STATIC else {}
        run = replayed(module, self.device)
        if isinstance(run, fxq.CudaGraphs):
            run.reserve(*self.probe)
        return self.built(run, kernel=checked.kernel, refusal=checked.refusal, facts={**checked.facts, **memory})


def run_rollout(session: Session, sizes: Sizes) -> None:
    """One step: all contestants, the video of each timed in turns."""

    def work(step: str) -> dict[str, Any]:
        rollout = make_rollout(sizes, session.device)
        tables = device_tables(session.device)
        with sampling_with(tables):
            video = Video(rollout, last_call(rollout), tables, session.device)

        def reference() -> Tensor:
            exact = in_dtype(rollout, torch.float32).model
            return exact(*cast_args(video.probe, torch.float32))[0]

        def compiled(graph: bool, attention: str = "") -> Built:
            run = video.compiled(session.dry, attention)
            return video.built(replayed(run, session.device) if graph else run, kernel="inductor, block by block")

        def take(seconds: float) -> float:
            return 0.0 if session.dry else seconds

        def quantized(recipe: str, seconds: float) -> Entry:
            make = functools.partial(video.quantized, recipe)
            name, bound = ours_name(recipe), LEAST["int8"]
            return Entry(name, make, bound=bound, uses=ALL_OPS, graph=False, cold=False, takes=take(seconds))

        def floats(name: str, make: Callable[[], Built], seconds: float = 0.0, needs: str = "") -> Entry:
            bound = LEAST["bfloat16"]
            return Entry(name, make, "bfloat16", bound, graph=False, cold=False, needs=needs, takes=take(seconds))

        def graphs(attention: str) -> Entry:
            make = functools.partial(compiled, True, attention)
            return floats(compiled_name(attention, True), make, 40, NEEDS[attention])

        others = [graphs(name) for name in NEEDS if name not in ("", CUDNN)]
        entries = [  # first what the bars are about: what comes last is left out where time is short
            floats(EAGER, lambda: video.built(rollout.model)),
            quantized(STATIC, 60),
            graphs(""),
            graphs(CUDNN),
            quantized(INT8_ATTENTION, 70),
            *others,
            quantized(DYNAMIC, 60),
            floats(COMPILED, lambda: compiled(False), 50),
        ]
        opponents = (EAGER, COMPILED, COMPILED_GRAPH)
        return session.contest(step, reference, entries, opponents, rounds=min(3, session.rounds))

    layers, chunk = sizes.config.num_layers, sizes.rows[0]
    session.step("rollout", f"{sizes.chunks} chunks of {chunk} tokens, {layers} blocks", work)
