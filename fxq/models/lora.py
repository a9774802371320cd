"""Low-rank updates (LoRA, arXiv 2106.09685) merged into weights before they are quantized."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fxq.models.checkpoints import PREFIXES, CheckpointError, compact, plain_names, read_raw
from fxq.models.lora_config import LoraSettings, read_settings

LORA_KEYS = ("generator_lora", "lora", "generator_ema", "generator", "model")
_PEFT = "base_model.model."
_NAME = re.compile(r"(.+?)\.lora_(A|B|down|up)(?:\.default)?\.weight")
_ALPHA = re.compile(r"(.+?)\.alpha")


@dataclasses.dataclass(frozen=True)
class Update:
    """``scale * up @ down`` for one linear: ``down`` [rank, K], ``up`` [N, rank], scale = alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float

    def merged(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight`` [N, K] plus the update, computed in float32 and rounded once to ``dtype``."""
        return (weight.float() + self.scale * (self.up.float() @ self.down.float())).to(dtype)


def read_lora(path: str | pathlib.Path, alpha: float | None = None) -> dict[str, Update]:
    """The updates of a LoRA file by layer.

    Args:
        path: ``.pt`` (bare, or under ``generator_lora``) or ``.safetensors`` with names ``<layer>.lora_A.weight`` and
            ``lora_B`` (or ``lora_down``/``lora_up``), optionally ``<layer>.alpha``.
        alpha: numerator of the scale, for all layers; default: the file's alphas, else what an ``adapter_config.json``
            beside the file or the file's header says (``lora_alpha``, ``alpha_pattern``), else the rank, which makes
            the scale 1. The denominator is the rank, or its root where the settings have ``use_rslora``.

    Raises:
        CheckpointError: the file cannot be read, has no updates, other tensors, or half of a pair, is not finite, or
            its settings are more than a low-rank update (DoRA, trained biases, ...).
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a LoRA file")
    if alpha is not None and not math.isfinite(alpha):
        raise CheckpointError(f"alpha = {alpha}, expected a finite number")
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    names: dict[str, str] = {}
    strangers = []
    for name, tensor in plain_names(read_raw(path, LORA_KEYS), path).items():
        if match := _NAME.fullmatch(name):
            layer, side = _layer(match[1]), "down" if match[2] in ("A", "down") else "up"
            if side in halves.setdefault(layer, {}):
                raise CheckpointError(f"{path}: two tensors are {side} of {layer}, one of them {name}; keep one LoRA")
            halves[layer][side] = tensor
            names[layer] = match[1].removeprefix(_PEFT)
        elif match := _ALPHA.fullmatch(name):
            alphas[_layer(match[1])] = _alpha(path, name, tensor)
        else:
            strangers.append(name)
    _check_names(path, halves, [*strangers, *(f"{layer}.alpha" for layer in alphas if layer not in halves)])
    settings = read_settings(path, alpha)
    settings.check_layers(set(names.values()))
    if settings.root and alphas and alpha is None:
        raise CheckpointError(
            f"{path} has alphas of its own, {settings.source} has use_rslora: the scale is not known; give the alpha"
        )
    return {
        layer: _update(path, layer, pair, settings, names[layer], alphas.get(layer) if alpha is None else alpha)
        for layer, pair in halves.items()
    }


def _layer(name: str) -> str:
    """The layer's name in the model, without what peft and others put in front."""
    while name.startswith((*PREFIXES, _PEFT)):
        name = name.removeprefix(_PEFT) if name.startswith(_PEFT) else name.split(".", 1)[1]
    return name


def _alpha(path: pathlib.Path, name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{path}: {name} is {list(tensor.shape)}, expected one finite number")
    return float(tensor)


def _check_names(path: pathlib.Path, halves: Mapping[str, Mapping[str, Tensor]], strangers: list[str]) -> None:
    if not halves or strangers:
        raise CheckpointError(
            f"{path} is no LoRA for linears: it has {len(halves)} updates (<layer>.lora_A.weight with lora_B) and "
            f"{len(strangers)} other tensors: {compact(strangers)}"
        )
    single = [f"{layer} (only {next(iter(pair))})" for layer, pair in halves.items() if len(pair) == 1]
    if single:
        raise CheckpointError(f"{path}: half of a pair is missing for {compact(single)}")


def _update(
    path: pathlib.Path, layer: str, pair: Mapping[str, Tensor], settings: LoraSettings, name: str, alpha: float | None
) -> Update:
    down, up = pair["down"], pair["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise CheckpointError(
            f"{path}: {layer} has down {list(down.shape)} and up {list(up.shape)}, expected [rank, K] and [N, rank]"
        )
    for side, tensor in pair.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            what = "NaN or infinity" if tensor.is_floating_point() else f"{tensor.dtype} numbers"
            raise CheckpointError(
                f"{path}: {side} of {layer} has {what}, expected finite floats; train or download it again"
            )
    return Update(down, up, settings.scale(name, down.shape[0], alpha))


def check_updates(tensors: Mapping[str, Tensor], updates: Mapping[str, Update], path: pathlib.Path) -> None:
    """Compare the updates of the file ``path`` with the weights they are for.

    Raises:
        CheckpointError: an update of a layer that is not there, or of another shape.
    """
    unknown = [layer for layer in updates if f"{layer}.weight" not in tensors]
    if unknown:
        raise CheckpointError(f"{path} updates layers that the model does not have: {compact(unknown)}")
    for layer, update in updates.items():
        want = torch.Size((update.up.shape[0], update.down.shape[1]))
        if tensors[f"{layer}.weight"].shape != want:
            raise CheckpointError(
                f"{path} updates {layer} as {list(want)}, the model's weight is "
                f"{list(tensors[f'{layer}.weight'].shape)}; the LoRA belongs to a model of another size"
            )
