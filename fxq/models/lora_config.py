"""The scale of every update of a LoRA, as peft computes it; settings that change more than the scale are refused."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open

from fxq.models.checkpoints import CheckpointError
from fxq.runtime.messages import first_line
from fxq.runtime.reading import parse_json, read_json

CONFIG = "adapter_config.json"
_HEADER = "lora_adapter_metadata"  # where diffusers keeps the same settings, in the file's header
_COMPONENTS = ("transformer.", "unet.")
_MERGE = "merge the LoRA with the tool that trained it, save the model, and quantize that"
_LARGEST = 1e30
_LONGEST, _REPEATS = 300, 3  # of a pattern: bounds what matching it can cost

_SCALE = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_WITHOUT_EFFECT = {  # on merged weights
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # use_qalora turns it on
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_EXPECTED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """What ``adapter_config.json`` says of scales; ``source`` is where it was read, for messages."""

    source: str = ""
    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    root: bool = False

    def scale(self, layer: str, rank: int, alpha: float | None) -> float:
        """The scale of a layer's update: alpha / rank, with ``use_rslora`` alpha / sqrt(rank).

        Args:
            layer: name as in the file, without ``base_model.model.``; patterns match its end, as in peft.
            rank: of the update in the file.
            alpha: the caller's or the file's, in the place of the settings'.

        Raises:
            CheckpointError: when the update has another rank than the settings say.
        """
        key = _matching(self.ranks, layer)
        stated = self.rank if key is None else self.ranks[key]
        if stated is not None and stated != rank:
            raise CheckpointError(
                f"{self.source}: {layer} has rank {rank} in the file and {stated} by the settings; they belong to "
                "different LoRAs, copy both again"
            )
        if alpha is None:
            key = _matching(self.alphas, layer)
            alpha = self.alpha if key is None else self.alphas[key]
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.root else rank)

    def check_layers(self, layers: set[str]) -> None:
        """Refuse patterns that name no layer of the file: their alpha or rank would be lost.

        Raises:
            CheckpointError: naming them.
        """
        for name, patterns in (("alpha_pattern", self.alphas), ("rank_pattern", self.ranks)):
            for key in patterns:
                if not any(_matches(key, layer) for layer in layers):
                    raise CheckpointError(
                        f"{self.source}: {name} {key!r} matches no layer of the LoRA; the names of the file and of its "
                        "settings differ, copy both again"
                    )


def _matches(key: str, layer: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", layer) is not None


def _matching(patterns: Mapping[str, object], layer: str) -> str | None:
    return next((key for key in patterns if _matches(key, layer)), None)


def read_settings(path: pathlib.Path, alpha: float | None = None) -> LoraSettings:
    """The settings of a LoRA file: ``adapter_config.json`` beside it, else those in the header of a safetensors file.

    Args:
        path: the file.
        alpha: the caller's, in the place of all that the settings say of alpha.

    Raises:
        CheckpointError: settings that cannot be read, have values of wrong types, or change the result in a way that
            merging does not follow (DoRA, biases, whole modules, other adapters than LoRA): naming the setting.
    """
    config = path.parent / CONFIG
    if config.exists():
        source = str(config)
        try:
            data = read_json(config, path.parent)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{source} is not valid JSON: {first_line(error, 160)}; copy it again") from error
    else:
        source, data = f"{path}, {_HEADER}", _from_header(path)
        if data is None:
            return LoraSettings()
    if not isinstance(data, dict):
        raise CheckpointError(f"{source} holds a {type(data).__name__}, expected a table of settings")
    _refuse_others(source, data)
    ranks, alphas = (_patterns(source, data, name) for name in ("rank_pattern", "alpha_pattern"))
    return LoraSettings(
        source,
        None if data.get("r") is None else _rank(source, "r", data["r"]),
        _number(source, "lora_alpha", data.get("lora_alpha")) if alpha is None else None,
        {key: _rank(source, f"rank_pattern {key!r}", value) for key, value in ranks.items()},
        {key: _number(source, f"alpha_pattern {key!r}", value) for key, value in alphas.items()},
        _flag(source, "use_rslora", data.get("use_rslora")),
    )


def _from_header(path: pathlib.Path) -> object:
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(_HEADER)
        data = None if text is None else parse_json(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {_HEADER} in its header is not valid JSON: {first_line(error, 160)}") from error
    if isinstance(data, dict):
        for component in _COMPONENTS:
            if own := {k.removeprefix(component): v for k, v in data.items() if k.startswith(component)}:
                return own
    return data


def _refuse_others(source: str, data: Mapping[str, object]) -> None:
    """Refuse settings with an effect that is not in the scale."""
    for key, value in data.items():
        if key in _SCALE or key in _WITHOUT_EFFECT:
            continue
        if key in _EXPECTED:
            fits = any(type(value) is type(known) and value == known for known in _EXPECTED[key])
        else:  # what is off is off, also what this version does not know
            fits = value is None or value is False or value in ("", [], {}) or value == 0
        if not fits and value is not None:
            raise CheckpointError(f"{source}: {key} = {str(value)[:80]!r} is more than a low-rank update; {_MERGE}")


def _patterns(source: str, data: Mapping[str, object], name: str) -> dict[str, object]:
    patterns = data.get(name)
    if patterns is None:
        return {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{source}: {name} is {patterns!r}, expected a table of patterns")
    for key in patterns:
        repeats = re.findall(r"(?<!\\)[*+{?]", key)
        if len(key) > _LONGEST or len(repeats) > _REPEATS or re.search(r"\)[*+{?]", key):
            raise CheckpointError(
                f"{source}: {name} {key[:80]!r} is too involved to match safely; write the names of the layers instead"
            )
        try:
            re.compile(key)
        except (re.error, OverflowError) as error:
            raise CheckpointError(f"{source}: {name} {key!r} is no regular expression: {error}") from error
    return patterns


def _number(source: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise CheckpointError(f"{source} has no number {name} but {value!r}; give the alpha yourself")
    return float(value)


def _rank(source: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{source}: {name} is {value!r}, expected a rank, a positive integer")
    return value


def _flag(source: str, name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{source}: {name} is {value!r}, expected true or false")
    return bool(value)
