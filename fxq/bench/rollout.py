"""Contestants of the rollout level: a whole video through the denoiser, caches and sampler included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxq.bench import ours
from fxq.bench.cases import LEAST_SQNR, RolloutShape
from fxq.bench.contest import BASELINES, Built, Case, Contestant
from fxq.bench.floats import onednn_model, own_dtype
from fxq.bench.problems import like_trained, open_gates
from fxq.calibration.rollout import Draws, Rollout, current_call
from fxq.cpu import no_bfloat16
from fxq.dtypes import dtype_name
from fxq.models.causal_wan import CausalWan
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout

FRAMES = 3
EAGER, INDUCTOR, ONEDNN = "F.linear", "inductor, freezing", "oneDNN, packed"
_FLOATS: dict[str, Callable[[CausalWan], Callable[..., Any]]] = {
    EAGER: lambda model: model,
    INDUCTOR: lambda model: torch.compile(model),
    ONEDNN: onednn_model,
}


def make_rollout(shape: RolloutShape, device: str) -> SelfForcingRollout:
    """A Self-Forcing rollout of one video through a float32 model with random weights."""
    torch.manual_seed(0)
    config = shape.config
    model = CausalWan(config).eval().requires_grad_(False)
    like_trained(model)
    open_gates(model)
    condition = {"prompt_embeds": torch.randn(1, config.text_len, config.text_dim, dtype=torch.float32)}
    draws = Draws([1], (FRAMES * shape.chunks, config.in_dim, *shape.latent))
    sampler = SamplerConfig(steps=shape.steps, frames_per_chunk=FRAMES)
    return SelfForcingRollout(model.to(device), [(condition, draws)], sampler)


def in_dtype(rollout: SelfForcingRollout, dtype: torch.dtype) -> SelfForcingRollout:
    """The same rollout through a copy of the model in ``dtype``."""
    return SelfForcingRollout(copy.deepcopy(rollout.model).to(dtype), rollout.batches, rollout.sampler)


def last_call(rollout: Rollout) -> tuple[object, ...]:
    """Arguments of the first denoiser call of the last chunk, where the cache is longest."""
    condition, draws = rollout.batches[0]
    last, found = rollout.units(condition, draws) - 1, []

    def record(*args: object) -> object:
        call = current_call()
        if call is not None and (call.chunk, call.spans[-1].step) == (last, 0):
            found.append(args)
        return rollout.denoiser(*args)

    with rollout.using(record):
        rollout.rollout(condition, draws)
    return found[0]


def cast_args(args: tuple[object, ...], dtype: torch.dtype) -> tuple[object, ...]:
    """A denoiser call's arguments in ``dtype``; timesteps and the rotary tables stay float32."""
    x, t, *rest, cos, sin = args

    def convert(value: object) -> object:
        return value.to(dtype) if isinstance(value, Tensor) else value

    return (convert(x), t, *pytree.tree_map(convert, rest), cos, sin)


def _through(rollout: Rollout, module: Callable[..., object]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with rollout.using(module):
            return rollout.rollout(*rollout.batches[0])

    return call


def rollout_case(shape: RolloutShape, device: str) -> Case:
    """A video; what is compared is one call of the last chunk on the arguments of the float32 rollout.

    Whole videos are not compared: small differences grow from chunk to chunk in any arithmetic.
    """
    base, own = make_rollout(shape, device), own_dtype(device)
    args: list[tuple[object, ...]] = []

    def reference() -> Tensor:
        args.append(last_call(base))
        return cast(Tensor, base.denoiser(*args[0])[0])

    def plain(dtype: torch.dtype, kernel: str) -> Built:
        rollout = in_dtype(base, dtype)
        run, probe = _FLOATS[kernel](rollout.model), cast_args(args[0], dtype)
        return Built(_through(rollout, run), kernel, lambda: run(*probe)[0])

    def quantized() -> Built:
        rollout = in_dtype(base, own)
        module = ours.optimized(rollout.model, rollout, ours.speed_recipe(dual_scale=True))
        probe = cast_args(args[0], own)
        return ours.finish(module, probe, device, _through(rollout, module), output=lambda: module(*probe)[0])

    bounds = LEAST_SQNR["rollout"]

    def floats(name: str, kernel: str) -> Contestant:
        dtype = torch.float32 if name.startswith("fp32") else torch.bfloat16
        text = dtype_name(dtype)
        obstacle = no_bfloat16() if (kernel, dtype) == (ONEDNN, torch.bfloat16) else ""
        return Contestant(name, lambda: plain(dtype, kernel), bounds[text], text, text, obstacle=obstacle)

    contestants = (
        *(floats(name, EAGER) for name in BASELINES),
        *(floats(f"{name} compiled", INDUCTOR) for name in ("fp32", "bf16")),
        *(floats(f"{name} oneDNN", ONEDNN) for name in ("fp32", "bf16") if torch.device(device).type == "cpu"),
        Contestant("fxq dual scale", quantized, bounds["int8"], "int8", dtype_name(own), ours=True),
    )
    return Case(shape.name, reference, contestants, facts={"chunks": shape.chunks, **vars(shape.config)})
