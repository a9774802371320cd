"""Families whose files say the same in other tensors: each adapter knows its own by their names and translates them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from torch import Tensor

from fxq.models.published import skyreels
from fxq.models.published.names import DIFFUSERS, ORIGINAL, Naming

Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """``fits`` looks at names, ``adapt`` gives the tensors of Wan's own form."""

    name: str
    fits: Callable[[Mapping[str, Tensor]], bool]
    adapt: Callable[[Mapping[str, Tensor]], Tensors]


def _in_diffusers_style(tensors: Mapping[str, Tensor]) -> bool:
    return Naming.of(tensors).style == DIFFUSERS


def _from_diffusers(tensors: Mapping[str, Tensor]) -> Tensors:
    naming = Naming.of(tensors)
    return {naming.rename(name, ORIGINAL): tensor for name, tensor in tensors.items()}


ADAPTERS = (
    Adapter("names of diffusers (FastVideo, HY-WorldPlay)", _in_diffusers_style, _from_diffusers),
    Adapter("SkyReels-V2 DF", skyreels.fits, skyreels.adapt),
)


def adapted(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors under Wan's own names, translated by every adapter that knows them."""
    found = dict(tensors)
    for adapter in ADAPTERS:
        if adapter.fits(found):
            found = adapter.adapt(found)
    return found


_LAYER = re.compile(r"(.*\.)?(blocks\.\d+\.(attn[12]|ffn\.net)\.|condition_embedder\.)")


def own_layer(layer: str) -> str:
    """A layer's name among Wan's own, where it is one of diffusers, with any prefix; else unchanged."""
    found = _LAYER.match(layer)
    return Naming(DIFFUSERS, found[1] or "").rename(layer, ORIGINAL) if found else layer
