"""Models by name for the command line: the shipped one, published ones, a plug-in's, or a user's function.

The last two return a rollout.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxq import plugins
from fxq.calibration.rollout import Draws, Rollout
from fxq.export.hub.weights import locate_weights
from fxq.lab import tiny_rollout
from fxq.models.families import FAMILIES, FLOATS, SHIPPED_MODELS, Family, read_settings, with_settings
from fxq.models.loading import load_causal_wan, seen_sizes
from fxq.models.prompts import TAKES, Prompts, load_function, load_prompts
from fxq.models.published.sizes import HEAD, UNSEEN
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import load_tiny
from fxq.models.video.text_encoder import encoded, is_words, read_texts


class AdapterError(ValueError):
    """A model name that leads to no rollout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """What a published model is made of and driven with.

    ``checkpoint`` and ``lora`` are files, or of the hub (:func:`~fxq.export.hub.weights.locate_weights`); ``config``
    (JSON settings) is a file, ``prompts`` a file or ``module:function``, and
    ``texts`` prompts in words in its place; words are encoded by the model in the folder ``text_encoder``.
    ``settings`` replace single ones of the family. ``frames``, ``height`` and ``width`` (latent pixels) are those of
    the videos, the family's by default; ``batch`` videos are driven at once, one by default; ``dtype`` is the model's
    and the text encoder's; they run on ``device``, by default on a GPU where there is one. With ``fixed_size`` the
    graph is captured for frames of this height and width only.
    """

    checkpoint: pathlib.Path | None = None
    prompts: str | None = None
    texts: tuple[str, ...] | None = None
    text_encoder: pathlib.Path | None = None
    lora: pathlib.Path | None = None
    lora_alpha: float | None = None
    config: pathlib.Path | None = None
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    batch: int | None = None
    dtype: str | None = None
    device: str | None = None
    fixed_size: bool = False


def parse_settings(pairs: Sequence[str]) -> dict[str, object]:
    """Settings from ``NAME=VALUE`` words; a value is JSON, or else text.

    Raises:
        AdapterError: for a word without ``=``.
    """
    settings: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise AdapterError(f"setting {pair!r}: expected NAME=VALUE, such as num_frame_per_block=1")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def make_rollout(name: str, videos: int, seed: int, files: ModelFiles | None = None, *, driven: bool = True) -> Rollout:
    """The rollout a name stands for.

    Args:
        name: ``tiny``, a family of :data:`~fxq.models.families.FAMILIES`, a plug-in's whose function returns a
            :class:`fxq.Rollout` of ``(videos, seed, files)``, or ``package.module:function`` where
            ``function(videos, seed)`` does.
        videos: number of videos to drive.
        seed: of prompts and noise.
        files: of a family or a plug-in; the other names take no files, ``tiny`` takes a batch and a device.
        driven: whether the rollout will be run; if not, a family needs no prompts.

    Raises:
        AdapterError: when the name leads to nothing or to something else, or files are missing or too many.
        PluginError: when the name's plug-in cannot be used.
        CheckpointError: when the files hold another model.
        PromptError: when the prompts do not fit.
    """
    if (plugin := plugins.find(plugins.MODELS, name, SHIPPED_MODELS)) is not None:
        return _checked(name, plugin.load()(videos, seed, files or ModelFiles()))
    if name in FAMILIES:
        return family_rollout(name, videos, seed, files or ModelFiles(), driven=driven)
    given = files or ModelFiles()
    own = dataclasses.replace(given, batch=None, device=None) if name == "tiny" else given
    if own != ModelFiles():
        raise AdapterError(f"model {name!r} takes no files; a checkpoint needs one of: {', '.join(FAMILIES)}")
    if name == "tiny":
        model = load_tiny().to(parse_device(given.device))
        return tiny_rollout(model, videos, seed=seed, unseen=False, batch=given.batch or 64)[0]
    if ":" not in name:
        raise AdapterError(
            f"unknown model {name!r}: expected 'tiny', one of "
            f"{', '.join((*FAMILIES, *plugins.names(plugins.MODELS)))}, or 'package.module:function' returning a "
            "fxq.Rollout; no folder has that name either"
        )
    return _checked(name, load_function(name, AdapterError, *TAKES)(videos, seed))


def _checked(name: str, rollout: object) -> Rollout:
    if not isinstance(rollout, Rollout):
        raise AdapterError(f"model {name!r} returned {type(rollout).__name__}, expected a fxq.Rollout")
    return rollout


def find_family(name: str, files: ModelFiles) -> Family:
    """A family with the settings of ``files``; ``causal-wan`` takes its sizes from a config.json or from settings.

    Raises:
        AdapterError: when the name is no family, or dtype or sizes are impossible.
        CheckpointError: when settings are unknown or do not fit.
    """
    if name not in FAMILIES:
        raise AdapterError(f"unknown family {name!r}: expected one of {', '.join(FAMILIES)}")
    family, settings = FAMILIES[name], dict(files.settings)
    if files.config is not None:
        settings = read_settings(files.config) | settings
    elif name == "causal-wan" and files.checkpoint is not None:
        settings = _found_settings(found_weights(files.checkpoint), settings)
    family = with_settings(family, settings)
    channels, rows, columns = family.config.in_dim, files.height or family.latent[1], files.width or family.latent[2]
    _, patch_rows, patch_columns = family.config.patch_size
    if rows % patch_rows or columns % patch_columns:
        raise AdapterError(f"latents of {rows} x {columns} are not whole patches of {patch_rows} x {patch_columns}")
    return dataclasses.replace(family, frames=files.frames or family.frames, latent=(channels, rows, columns))


@functools.cache
def found_weights(given: pathlib.Path) -> pathlib.Path:
    """Weights that were given as a path or by a repository, which is asked once."""
    return locate_weights(given)


def _found_settings(checkpoint: pathlib.Path, given: dict[str, object]) -> dict[str, object]:
    """What was given, or the config.json beside a file; without one, what was given and what the shapes show."""
    beside = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    if beside.is_file():
        return given or read_settings(checkpoint)
    if not (seen := seen_sizes(checkpoint)):
        return given or read_settings(checkpoint)
    settings = seen | given
    if UNSEEN not in settings:
        dim = settings.get("dim")
        hint = (
            f", probably {dim // HEAD} (Wan has heads of {HEAD} channels)"
            if isinstance(dim, int) and dim >= HEAD
            else ""
        )
        raise AdapterError(
            f"{checkpoint} shows all sizes but the number of heads: say --set {UNSEEN}=N{hint}, or --config config.json"
        )
    return settings


def parse_device(name: str | None) -> torch.device:
    """The device of a name; None: a GPU where there is one.

    Raises:
        AdapterError: when there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise AdapterError(f"device {name!r}: expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise AdapterError(f"device {name!r}: torch sees no GPU here; fxq doctor says more")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """The floating point dtype of a name.

    Raises:
        AdapterError: for any other name.
    """
    if name not in FLOATS:
        raise AdapterError(f"dtype {name!r}: expected one of {', '.join(FLOATS)}")
    return FLOATS[name]


def family_rollout(name: str, videos: int, seed: int, files: ModelFiles, *, driven: bool = True) -> SelfForcingRollout:
    """A published model bound to ``videos`` prompts; prompts are repeated with other noise when there are fewer.

    One that is not ``driven`` may have no prompts.
    """
    family = find_family(name, files)
    if files.checkpoint is None or (not has_prompts(files) and driven):
        wanted = "prompts (a .safetensors or .npz of embeddings, or a .txt of words with a --text-encoder)"
        missing = "checkpoint" if files.checkpoint is None else wanted
        raise AdapterError(f"model {name!r} needs {missing}; its weights are published as {family.source}")
    config = family.config
    batches = [
        (
            {"prompt_embeds": torch.zeros(1, 1, config.text_dim, dtype=torch.float32)},
            Draws([seed], (family.frames, *family.latent)),
        )
    ]
    if has_prompts(files):
        prompts = family_prompts(family, files, videos, seed)
        batches = _batches(family, prompts, videos, seed, files.batch or 1)
    dtype = None if files.dtype is None else parse_dtype(files.dtype)
    lora = None if files.lora is None else found_weights(files.lora)
    weights = found_weights(files.checkpoint)
    model = load_causal_wan(weights, family, lora=lora, lora_alpha=files.lora_alpha, dtype=dtype)
    model = model.to(parse_device(files.device))
    rollout = SelfForcingRollout(model, batches, family.sampler, any_size=not files.fixed_size)
    try:
        rollout.units(*rollout.batches[0])
    except ValueError as error:
        raise AdapterError(f"model {name!r}: {error}; choose another number of frames") from None
    return rollout


def has_prompts(files: ModelFiles) -> bool:
    """Whether there are any, as embeddings or in words."""
    return files.prompts is not None or files.texts is not None


def family_prompts(family: Family, files: ModelFiles, count: int, seed: int) -> Prompts:
    """The prompts of ``files`` as a family's denoiser takes them.

    Raises:
        AdapterError: words without a text encoder, or with one of another width.
        CheckpointError: when the text encoder cannot be read.
        PromptError: when there are none, or they do not fit.
    """
    config = family.config
    if files.texts is None and not is_words(str(files.prompts)):
        return load_prompts(str(files.prompts), config.text_dim, config.text_len, count, seed)
    texts = files.texts or read_texts(str(files.prompts))
    if files.text_encoder is None:
        raise AdapterError(
            "prompts in words need the model's text encoder: --text-encoder with its folder, or with one of a Wan "
            "pipeline; or give embeddings, a .safetensors or .npz"
        )
    dtype = None if files.dtype is None else parse_dtype(files.dtype)
    prompts = encoded(files.text_encoder, texts, config.text_len, parse_device(files.device), dtype)
    if (width := prompts.embeddings[0].shape[1]) != config.text_dim:
        raise AdapterError(f"{files.text_encoder} makes embeddings of width {width}, the model takes {config.text_dim}")
    return prompts


def other_videos(
    rollout: SelfForcingRollout, name: str, files: ModelFiles, videos: int, seed: int, first: int = 0
) -> SelfForcingRollout:
    """The rollout of :func:`family_rollout` with other noise, on the prompts from number ``first`` on.

    Raises:
        AdapterError, PromptError: as there.
    """
    family = find_family(name, files)
    prompts = family_prompts(family, files, first + videos, seed)
    batches = _batches(family, prompts, videos, seed, files.batch or 1, first)
    return SelfForcingRollout(rollout.model, batches, rollout.sampler, any_size=rollout.any_size)


def _batches(
    family: Family, prompts: Prompts, videos: int, seed: int, batch: int, first: int = 0
) -> list[tuple[dict[str, Any], Draws]]:
    shape = (family.frames, *family.latent)
    pairs = []
    for start in range(first, first + videos, batch):
        numbers = range(start, min(start + batch, first + videos))
        embeddings = prompts.batch([i % len(prompts) for i in numbers], family.config.text_len)
        pairs.append(({"prompt_embeds": embeddings}, Draws([1000 * seed + i for i in numbers], shape)))
    return pairs
