"""Low-rank updates (LoRA, arXiv 2106.09685) merged into weights before they are quantized."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fxq.models.checkpoints import CheckpointError, compact, plain_names, read_raw
from fxq.reading import read_json

LORA_KEYS = ("generator_lora", "lora", "generator_ema", "generator", "model")
_NAME = re.compile(r"(?:base_model\.model\.|diffusion_model\.)?(.+?)\.lora_(A|B|down|up)(?:\.default)?\.weight")
_ALPHA = re.compile(r"(?:base_model\.model\.|diffusion_model\.)?(.+?)\.alpha")


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
        alpha: numerator of the scale, for all layers; default: the file's alphas, else ``lora_alpha`` of an
            ``adapter_config.json`` beside the file, else the rank, which makes the scale 1.

    Raises:
        CheckpointError: the file cannot be read, has no updates, other tensors, or half of a pair.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a LoRA file")
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    strangers = []
    for name, tensor in plain_names(read_raw(path, LORA_KEYS), path).items():
        if match := _NAME.fullmatch(name):
            side = "down" if match[2] in ("A", "down") else "up"
            halves.setdefault(match[1].removeprefix("model."), {})[side] = tensor
        elif match := _ALPHA.fullmatch(name):
            if tensor.numel() != 1:
                raise CheckpointError(f"{path}: {name} has {tensor.numel()} values, expected one number")
            alphas[match[1].removeprefix("model.")] = float(tensor)
        else:
            strangers.append(name)
    _check_names(path, halves, strangers)
    default = alpha if alpha is not None else _config_alpha(path)
    return {layer: _update(path, layer, pair, alpha, alphas, default) for layer, pair in halves.items()}


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
    path: pathlib.Path,
    layer: str,
    pair: Mapping[str, Tensor],
    alpha: float | None,
    alphas: Mapping[str, float],
    default: float | None,
) -> Update:
    down, up = pair["down"], pair["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise CheckpointError(
            f"{path}: {layer} has down {list(down.shape)} and up {list(up.shape)}, expected [rank, K] and [N, rank]"
        )
    rank = down.shape[0]
    chosen = alphas.get(layer, default) if alpha is None else alpha
    return Update(down, up, 1.0 if chosen is None else chosen / rank)


def _config_alpha(path: pathlib.Path) -> float | None:
    config = path.parent / "adapter_config.json"
    if not config.exists():
        return None
    try:
        return float(read_json(config, path.parent)["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{config} has no number lora_alpha; give the alpha yourself") from error


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
