"""The causal Wan models people have: their sizes, their sampling loops and where they are published."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from fxq.cache.policy import CachePolicy
from fxq.dtypes import DTYPES
from fxq.models.causal_wan import CausalWanConfig
from fxq.models.checkpoints import KEYS, CheckpointError
from fxq.models.published.settings import official
from fxq.models.schedule import FlowSchedule
from fxq.models.self_forcing import SamplerConfig
from fxq.runtime.reading import ReadError, read_json

FLOATS = {name: DTYPES[name] for name in ("float32", "bfloat16", "float16")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A published model: ``config`` its sizes, ``sampler`` its loop, ``frames`` and ``latent`` (C, H, W) its videos.

    ``keys`` are the places of the denoiser in a ``.pt``, the preferred one first; ``lora`` says that the published
    weights are a base and a LoRA; ``source`` names the published file; ``note`` what the sampling loop here does
    differently.
    """

    name: str
    source: str
    config: CausalWanConfig = dataclasses.field(default_factory=CausalWanConfig.wan_1_3b)
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    frames: int = 21
    latent: tuple[int, int, int] = (16, 60, 104)
    keys: tuple[str, ...] = KEYS
    lora: bool = False
    note: str = ""


_FRAMEWISE = SamplerConfig(frames_per_chunk=1)
_FIRST = (1000.0, 750.0, 500.0, 250.0)
_TWO_STEP = SamplerConfig(frames_per_chunk=1, steps=(1000, 500), first_chunk_steps=_FIRST)
_ONE_STEP = SamplerConfig(frames_per_chunk=1, steps=(1000,), first_chunk_steps=_FIRST)
_KREA = SamplerConfig(steps=(1000, 750, 500, 250, 0), cache=CachePolicy(window=6))
_CAUSAL_FORCING = "huggingface.co/zhuhz22/Causal-Forcing"
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="self-forcing",
            source="huggingface.co/gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt",
        ),
        Family(name="causal-forcing", source=f"{_CAUSAL_FORCING} chunkwise/causal_forcing.pt"),
        Family(
            name="causal-forcing-framewise",
            source=f"{_CAUSAL_FORCING} framewise/causal_forcing.pt",
            sampler=_FRAMEWISE,
        ),
        Family(
            name="causal-forcing-2step",
            source=f"{_CAUSAL_FORCING} causal-forcing++/framewise-2step.pt",
            sampler=_TWO_STEP,
        ),
        Family(
            name="causal-forcing-1step",
            source=f"{_CAUSAL_FORCING} causal-forcing++/framewise-1step.pt",
            sampler=_ONE_STEP,
        ),
        Family(
            name="longlive",
            source="LongLive v1: longlive_base.pt with lora.pt",
            sampler=SamplerConfig(cache=CachePolicy(window=12, sink=3)),
            frames=120,
            keys=("generator", "generator_ema", "model"),
            lora=True,
        ),
        Family(
            name="krea-14b",
            source="krea-realtime-video-14b.safetensors",
            config=CausalWanConfig.wan_14b(),
            sampler=_KREA,
            note="the cache keeps the context call's keys; the published loop encodes the last frames again per chunk",
        ),
        Family(name="causal-wan", source="a causal Wan checkpoint with a config.json"),
    )
}

_SAMPLER_SETTINGS = {
    "denoising_step_list": "steps",
    "denoising_step_list_first_chunk": "first_chunk_steps",
    "warp_denoising_step": "warp",
    "num_frame_per_block": "frames_per_chunk",
    "context_noise": "context_noise",
}
_CACHE_SETTINGS = {"local_attn_size": "window", "sink_size": "sink"}
_CONFIG_SETTINGS = {field.name for field in dataclasses.fields(CausalWanConfig)}
_MOST_LAYERS, _MOST = 1000, 1 << 20
"""Sizes that no model has; a settings file may say anything, and layers take time before a weight is looked for."""
_IGNORED = {"window_size", "num_train_timestep", "num_output_frames"}


def with_settings(family: Family, settings: Mapping[str, Any]) -> Family:
    """``family`` with settings under their official names (``config.json`` and the inference configuration).

    Args:
        family: where unnamed settings come from.
        settings: fields of :class:`~fxq.models.causal_wan.CausalWanConfig`, those of diffusers and FastVideo
            (:func:`~fxq.models.published.settings.official`), ``denoising_step_list``,
            ``num_frame_per_block``, ``local_attn_size``, ``sink_size``, ``timestep_shift`` and relatives.

    Raises:
        CheckpointError: an unknown setting, an impossible value, or another kind of model.
    """
    try:
        public = official(settings)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    shift = public.pop("timestep_shift", None)
    unknown = sorted(public.keys() - _CONFIG_SETTINGS - _SAMPLER_SETTINGS.keys() - _CACHE_SETTINGS.keys() - _IGNORED)
    if unknown:
        known = ", ".join(sorted({*_CONFIG_SETTINGS, *_SAMPLER_SETTINGS, *_CACHE_SETTINGS, "timestep_shift"}))
        raise CheckpointError(f"unknown settings {', '.join(unknown)}; known are {known}")
    sizes = {key: value for key, value in public.items() if key in _CONFIG_SETTINGS}
    for key in sizes.keys() - {"patch_size", "eps"}:
        most = _MOST_LAYERS if key == "num_layers" else _MOST
        if not isinstance(sizes[key], int) or not 0 <= sizes[key] <= most:
            raise CheckpointError(f"setting {key} is {sizes[key]!r}, expected a whole number, {most} at most")
    loop = {_SAMPLER_SETTINGS[key]: value for key, value in public.items() if key in _SAMPLER_SETTINGS}
    try:
        if shift is not None:
            loop["schedule"] = FlowSchedule(shift=float(shift))
        kept = {_CACHE_SETTINGS[key]: value for key, value in public.items() if key in _CACHE_SETTINGS}
        loop["cache"] = dataclasses.replace(family.sampler.cache, **kept)
        config = dataclasses.replace(family.config, **sizes)
        return dataclasses.replace(family, config=config, sampler=dataclasses.replace(family.sampler, **loop))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"the settings {json.dumps(public, default=str)} do not fit: {error}") from None


SHIPPED_MODELS = ("tiny", "diffusers", *FAMILIES)
"""Models by the names that they have on the command line; others come by :mod:`fxq.plugins`."""


def read_settings(path: str | pathlib.Path) -> dict[str, object]:
    """Settings of a JSON file, or of the ``config.json`` in a folder or beside a weight file.

    Raises:
        CheckpointError: no such file, or no JSON object in it.
    """
    path = pathlib.Path(path)
    if path.suffix != ".json":
        path = (path if path.is_dir() else path.parent) / "config.json"
    try:
        settings = read_json(path)
    except (OSError, ReadError) as error:
        raise CheckpointError(f"{path} is no readable JSON: {error}; expected the model's config.json") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds a {type(settings).__name__}, expected a JSON object of settings")
    return settings
