"""A Self-Forcing rollout between two chunks as a file, from which a killed one goes on."""

from __future__ import annotations

import hashlib
import json
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxq.cache.saved import SavedCacheError, cache_from_tensors, cache_to_tensors
from fxq.cache.saved_absorption import PREFIX, absorption_from_tensors, absorption_to_tensors
from fxq.models.self_forcing import SelfForcingRollout, SelfForcingState
from fxq.runtime.reading import ReadError, parse_json, read_header, regular_file
from fxq.runtime.writable import whole_file

_CROSS = ("cross_k", "cross_v")


def save_state(state: SelfForcingState, path: str | os.PathLike[str]) -> None:
    """Write a state, whole or not at all; nothing in it is pickled.

    Raises:
        OSError: when the file cannot be written.
    """
    tensors, facts = cache_to_tensors(state.cache)
    tensors["latents"] = state.latents.contiguous()
    for name in _CROSS:
        tensors |= {f"{name}.{i}": t.contiguous() for i, t in enumerate(getattr(state, name))}
    told = {"cache": facts, "next_unit": state.next_unit, "calls": state.calls, "video": _video(state)}
    if state.absorption is not None:
        seen, told["absorption"] = absorption_to_tensors(state.absorption)
        tensors |= seen
    with whole_file(path) as part:
        save_file(tensors, part, metadata={"fxq_state": json.dumps(told)})


def load_state(rollout: SelfForcingRollout, path: str | os.PathLike[str], batch: int = 0) -> SelfForcingState:
    """The state that :func:`save_state` wrote, to be advanced by a rollout of the same model, prompts and noise.

    Args:
        rollout: with the settings that the state was made with.
        path: the file.
        batch: number of the rollout's batch that the state is of.

    Raises:
        SavedCacheError: a damaged file, or one of another rollout, naming what does not fit.
        FileNotFoundError: there is no such file.
    """
    begun = rollout.begin(*rollout.batches[batch])
    try:
        told: object = parse_json(read_header(path).metadata.get("fxq_state", ""))
        tensors = load_file(regular_file(path))
    except (ReadError, SafetensorError, ValueError) as error:
        raise SavedCacheError(f"{path} is no saved state: {error}") from error
    if not isinstance(told, dict) or told.get("video") != _video(begun):
        raise SavedCacheError(f"{path} is of other prompts, noise or sizes than the rollout that is to go on")
    unit, calls = told.get("next_unit"), told.get("calls")
    if (
        type(unit) is not int
        or type(calls) is not int
        or unit < 0
        or calls < 0
        or not isinstance(told.get("cache"), dict)
    ):
        raise SavedCacheError(f"{path}: its facts are damaged")
    device, own = begun.latents.device, rollout.model.config
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    latents = _taken(tensors, "latents", begun.latents, unit * rollout.sampler.frames_per_chunk)
    text = own.text_len if calls else 0
    cross = {
        name: tuple(_taken(tensors, f"{name}.{i}", begun.cross_k[i], text) for i in range(own.num_layers))
        for name in _CROSS
    }
    own_tensors = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
    cache = cache_from_tensors(tensors, told["cache"], begun.cache, begun.cache.rotary)
    if cache.frames != unit * rollout.sampler.frames_per_chunk:
        raise SavedCacheError(f"{path}: {cache.frames} frames in the cache and {unit} finished chunks")
    absorption = begun.absorption
    if absorption is not None:
        absorption = absorption_from_tensors(own_tensors, told.get("absorption"), absorption, unit, cache.closed)
    if own_tensors:
        raise SavedCacheError(f"{path} holds {min(own_tensors)!r}, which no setting of its policy stores")
    return SelfForcingState(
        begun.condition, begun.draws, unit, latents, cache, cross["cross_k"], cross["cross_v"], calls, absorption
    )


def _taken(tensors: dict[str, Tensor], name: str, like: Tensor, count: int) -> Tensor:
    found, want = tensors.pop(name, None), (like.shape[0], count, *like.shape[2:])
    if found is None or tuple(found.shape) != want or found.dtype != like.dtype:
        shown = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise SavedCacheError(f"{name} is {shown}: expected {like.dtype} {want}")
    return found


def _video(state: SelfForcingState) -> dict[str, object]:
    """What tells one batch of videos from another."""
    digest = hashlib.sha256()
    for name in sorted(state.condition):
        tensor = state.condition[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return {"seeds": list(state.draws.seeds), "shape": list(state.draws.shape), "condition": digest.hexdigest()}
