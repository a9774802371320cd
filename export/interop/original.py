"""The float weights that a bundle was quantized from, found by name and compared with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from fxq.export.interop.layers import InteropError, StoredModel, sqnr
from fxq.export.interop.names import ORIGINAL, Naming

LEAST = {8: 20.0, 4: 6.0}
"""dB of an original weight over its difference from the bundle's, by bits; below, it is another model's."""


def with_originals(model: StoredModel, weights: Mapping[str, Tensor] | None) -> StoredModel:
    """The model whose quantized layers know the float weights they were made of.

    Args:
        model: a bundle's content.
        weights: tensors by name, Wan's own or those of diffusers, with any prefix; None: the model as it is.

    Raises:
        InteropError: when a layer's weight is not there, has another shape, or is not what was quantized.
    """
    if weights is None:
        return model
    naming = Naming.of(weights)
    known = {naming.rename(name, ORIGINAL): tensor for name, tensor in weights.items()}
    layers, missing = {}, []
    for layer, stored in model.layers.items():
        found = known.get(f"{model.naming.rename(layer, ORIGINAL)}.weight")
        if found is None:
            missing.append(layer)
            continue
        weight = found.detach().cpu().float()
        if weight.shape != stored.integers.shape:
            raise InteropError(
                f"the original weight of {layer} is {list(weight.shape)}, the bundle's {list(stored.integers.shape)}: "
                "give the weights that were quantized"
            )
        close = sqnr(weight, stored.weight())
        if close is not None and not close >= LEAST[stored.bits]:
            raise InteropError(
                f"the original weight of {layer} is not what was quantized: {close} dB apart, expected at least "
                f"{LEAST[stored.bits]:g} for {stored.bits} bits. Give the weights of this bundle's model, with the "
                "LoRA that was merged into them"
            )
        layers[layer] = dataclasses.replace(stored, original=weight)
    if missing:
        raise InteropError(
            f"the original weights lack {len(missing)} of {len(model.layers)} quantized layers: "
            f"{', '.join(missing[:3])}. Give the weights that were quantized, by the names of the model"
        )
    return dataclasses.replace(model, layers=layers)
