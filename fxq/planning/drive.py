"""What driving a model on calibration data costs: calls, operations and bytes, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxq.calibration.rollout import Rollout
from fxq.models.self_forcing import SelfForcingRollout

_ALIVE = 8  # tensors of a block's width, and of its hidden width, that are alive at its worst moment


@dataclass(frozen=True)
class Drive:
    """The denoiser calls of a calibration.

    Attributes:
        calls: number of calls, of all videos or batches.
        flops: operations of all calls.
        sensitivity_flops: operations of the rollouts that measure sensitivities, 0 where that is not possible.
        tokens: rows that a linear of a block sees in one call.
        call_bytes: most memory of a call: inputs, outputs and what is alive between.
        kept_bytes: the cache of the full-precision video that measuring sensitivities keeps beside that of the call.
        assumptions: what was not counted.
    """

    calls: int = 0
    flops: float = 0.0
    sensitivity_flops: float = 0.0
    tokens: int = 0
    call_bytes: int = 0
    kept_bytes: int = 0
    assumptions: tuple[str, ...] = ()


def drive_batches(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], count: int) -> Drive:
    """Calls with one batch each.

    Args:
        model: any module; it is called once on the meta device.
        args: of the first batch.
        kwargs: of the first batch.
        count: number of batches.
    """
    given, options = pytree.tree_map_only(Tensor, _on_meta, (args, dict(kwargs)))
    state = {name: _on_meta(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    rows: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        rows.append(inputs[0].shape[:-1].numel())

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            result = torch.func.functional_call(model, state, given, options)
    finally:
        for handle in handles:
            handle.remove()
    tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
    tokens = max(rows, default=0)
    alive = _ALIVE * tokens * max((m.out_features for m in _linears(model)), default=0) * _itemsize(model)
    total = float(counter.get_total_flops())
    return Drive(count, count * total, 0.0, tokens, sum(t.nbytes for t in tensors) + alive)


def drive_rollout(rollout: Rollout) -> Drive:
    """Every video of a rollout once.

    The loop and the cache of :class:`~fxq.models.self_forcing.SelfForcingRollout` are known. Other adapters are taken
    to make five calls like their example call per unit.
    """
    if isinstance(rollout, SelfForcingRollout):
        return _self_forcing(rollout)
    args, _ = rollout.example_call()
    calls = 5 * sum(rollout.units(*batch) for batch in rollout.batches)
    drive = drive_batches(rollout.denoiser, args, {}, calls)
    units = max(rollout.units(*batch) for batch in rollout.batches)
    text = "five calls per chunk, each like the adapter's example call: its cache is short"
    forked = drive.flops * (units + 3) / 2
    return Drive(calls, drive.flops, forked, drive.tokens, drive.call_bytes, 0, (text,))


@dataclass(frozen=True)
class _Unit:
    """A chunk of a video: its calls, the keys before it, and the operations of its calls."""

    calls: int
    prefix: int
    flops: float


def _self_forcing(rollout: SelfForcingRollout) -> Drive:
    config, sampler = rollout.model.config, rollout.sampler
    batch, tokens, units = rollout.batches[0][1].batch, 0, list(_units(rollout))
    size = _itemsize(rollout.model)
    per_token = 2 * config.num_layers * config.dim * size * batch
    tokens = _chunk_tokens(rollout)
    prefix = max(unit.prefix for unit in units)
    text = 2 * config.text_len * per_token
    block = batch * size * (_ALIVE * tokens * config.dim + 3 * tokens * config.ffn_dim + 2 * prefix * config.dim)
    one = sum(unit.flops for unit in units)
    forks = sum((2 + i) * unit.flops for i, unit in enumerate(units))
    videos = len(rollout.batches)
    return Drive(
        calls=videos * sum(unit.calls for unit in units),
        flops=videos * one,
        sensitivity_flops=videos * forks,
        tokens=batch * tokens,
        call_bytes=(2 * prefix + 2 * tokens) * per_token + text + block,
        kept_bytes=prefix * per_token,
        assumptions=() if sampler.cache.window != -1 else ("the whole video stays in the cache",),
    )


def _units(rollout: SelfForcingRollout) -> Iterator[_Unit]:
    """The chunks of the first video; every video has as many."""
    (condition, draws), sampler, config = rollout.batches[0], rollout.sampler, rollout.model.config
    tokens, frames = _chunk_tokens(rollout), sampler.frames_per_chunk
    latent = condition.get("initial_latent")
    given = 0 if latent is None else latent.shape[1] // frames
    weights = {name: m.in_features * m.out_features for name, m in _named_linears(rollout.model)}
    linears = sum(size for name, size in weights.items() if _per_token(name))
    times = sum(size for name, size in weights.items() if name.startswith("time_"))
    text = sum(weights.values()) - linears - times
    linears += rollout.model.patch_embedding.weight.numel()
    for unit in range(rollout.units(condition, draws)):
        calls = 1 if unit < given else 1 + len(sampler.timesteps(unit == given))
        kept = unit * frames if sampler.cache.window == -1 else min(unit * frames, sampler.cache.window - frames)
        prefix = kept * tokens // frames
        products = 4 * tokens * (prefix + tokens + config.text_len) * config.dim * config.num_layers
        once = 2 * config.text_len * text if unit == 0 else 0
        call = 2 * tokens * linears + 2 * frames * times + products
        yield _Unit(calls, prefix, draws.batch * (calls * call + once))


def _per_token(name: str) -> bool:
    """Whether a linear of a causal Wan model sees every token of every call; time is seen once a frame, text once."""
    return name.startswith(("blocks.", "head.")) and not name.endswith(("cross_attn.k", "cross_attn.v"))


def _chunk_tokens(rollout: SelfForcingRollout) -> int:
    _, rows, columns = rollout.model.config.patch_size
    _, _, height, width = rollout.batches[0][1].shape
    return rollout.sampler.frames_per_chunk * (height // rows) * (width // columns)


def _named_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    return (module for _, module in _named_linears(model))


def _itemsize(model: nn.Module) -> int:
    return cast(Tensor, next(model.parameters())).dtype.itemsize


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
