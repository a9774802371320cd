"""Where a rollout between two chunks stands with absorbing layers, as tensors and facts; see :mod:`fxq.cache.saved`.

Before the layers are converted that is what was seen of the video, afterwards what stands for histories. What the last
chunk of a warm-up measures begins and ends within that chunk.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.cache.absorb import Absorption, Statistics, Verdict
from fxq.cache.compress import Few
from fxq.cache.saved import SavedCacheError

PREFIX = "absorption."
"""Of the names of the tensors."""


def absorption_to_tensors(absorption: Absorption) -> tuple[dict[str, Tensor], dict[str, object]]:
    """All that a rollout goes on with but for its settings: tensors by name and JSON facts."""
    tensors: dict[str, Tensor] = {}
    for i, found in enumerate(absorption.statistics):
        tensors |= {f"gram.{i}": found.gram, f"cross.{i}": found.cross}
    if absorption.verdicts:
        scores = [(verdict.left, verdict.relative) for verdict in absorption.verdicts]
        tensors["scores"] = torch.tensor(scores, dtype=torch.float64)
    for i in absorption.converted:
        if absorption.settings.tokens:
            tensors |= {f"{name}.{i}": tensor for name, tensor in absorption.few[i].inputs().items()}
        else:
            tensors[f"map.{i}"] = absorption.maps[i]
    named = {PREFIX + name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return named, {"priors": _digest(absorption.priors)}


def absorption_from_tensors(
    tensors: dict[str, Tensor], facts: object, begun: Absorption, unit: int, closed: Sequence[int]
) -> Absorption:
    """Inverse of :func:`absorption_to_tensors`.

    Args:
        tensors: what was stored, from which the absorption's are taken.
        facts: as stored.
        begun: that of the rollout at a video's start.
        unit: chunks that are finished.
        closed: layers that the cache keeps no history of.

    Raises:
        SavedCacheError: naming what does not fit.
    """
    if not isinstance(facts, dict) or facts.get("priors") != _digest(begun.priors):
        raise SavedCacheError(
            "the saved rollout absorbs layers with other priors than this one's, or its facts are damaged: go on with "
            "the absorb_priors that it was made with"
        )
    settings, layers = begun.settings, len(begun.maps)
    if unit < settings.warmup:
        if closed:
            raise SavedCacheError(
                f"the saved cache has no history of layers {list(closed)} after {unit} of {settings.warmup} chunks of "
                "the warm-up"
            )
        return dataclasses.replace(
            begun,
            statistics=tuple(
                Statistics(_taken(tensors, f"gram.{i}", old.gram), _taken(tensors, f"cross.{i}", old.cross))
                for i, old in enumerate(begun.statistics)
            ),
        )
    if len(closed) > settings.most_layers(layers):
        raise SavedCacheError(
            f"the saved cache has no history of {len(closed)} layers, of which ratio = {settings.ratio} converts "
            f"{settings.most_layers(layers)} at most"
        )
    scores = _taken(tensors, "scores", torch.empty(layers, 2, dtype=torch.float64)).tolist()
    verdicts = tuple(Verdict(left, part, i in closed) for i, (left, part) in enumerate(scores))
    maps, few = list(begun.maps), list(begun.few)
    for i in closed:
        if settings.tokens:
            few[i] = _few(tensors, i, begun.few[i], settings.tokens)
        else:
            maps[i] = _finite(f"map.{i}", _taken(tensors, f"map.{i}", begun.maps[i]))
    return dataclasses.replace(begun, maps=tuple(maps), few=tuple(few), statistics=(), verdicts=verdicts)


def _few(tensors: dict[str, Tensor], layer: int, none: Few, most: int) -> Few:
    weight = tensors.get(f"{PREFIX}weight.{layer}")
    count = weight.shape[1] if weight is not None and weight.ndim == 3 else 0
    if not 1 <= count <= most:
        raise SavedCacheError(
            f"{PREFIX}weight.{layer} is {_shown(weight)}: expected 1 to {most} keys and values for the layer's history"
        )

    def taken(name: str, like: Tensor) -> Tensor:
        want = like.new_empty((like.shape[0], count, *like.shape[2:]))
        return _finite(f"{name}.{layer}", _taken(tensors, f"{name}.{layer}", want))

    return Few(taken("keys", none.keys), taken("values", none.values), taken("weight", none.weight))


def _taken(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    found = tensors.pop(PREFIX + name, None)
    if found is None or found.shape != like.shape or found.dtype != like.dtype:
        raise SavedCacheError(f"{PREFIX}{name} is {_shown(found)}: expected {like.dtype} {tuple(like.shape)}")
    return found


def _finite(name: str, found: Tensor) -> Tensor:
    if not bool(found.isfinite().all()):
        raise SavedCacheError(f"{PREFIX}{name} holds NaN or infinity")
    return found


def _shown(found: Tensor | None) -> str:
    return "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"


def _digest(priors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for prior in priors:
        held = prior.detach().cpu().contiguous()
        digest.update(f"{held.dtype} {tuple(held.shape)}".encode())
        digest.update(held.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
