"""How far a quantized model's outputs are from the model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxq.numerics import decibels, energy


def output_sqnr(model: Callable[..., object], quantized: Callable[..., object], batches: Iterable[object]) -> float:
    """Signal to quantization-noise ratio in dB over every floating-point output of every batch.

    ``10 log10(sum want^2 / sum (want - got)^2)``, both sums over all elements of all outputs in float64: an output
    counts by its energy.

    Args:
        model: the reference; called as the items say, without gradients.
        quantized: called the same way; inputs are copied before each call.
        batches: items in a calibration loader's forms: a mapping is keyword arguments, a tuple or list positional ones,
            a tensor is one argument, anything else has ``args`` and ``kwargs``. Outputs may be nested; leaves that are
            not floating-point tensors are left out.

    Returns:
        The ratio; infinite when all outputs are equal, NaN when an output has NaN.

    Raises:
        ValueError: when there is no floating-point output, or the two return different numbers or shapes of them.
    """
    signal, noise, seen = 0.0, 0.0, False
    with torch.no_grad():
        for item in batches:
            want, got = (_floating(_call(f, item)) for f in (model, quantized))
            if [t.shape for t in want] != [t.shape for t in got]:
                shapes = [[tuple(t.shape) for t in tensors] for tensors in (want, got)]
                raise ValueError(f"the outputs differ in number or shape: {shapes[0]} of the model, {shapes[1]}")
            for a, b in zip(want, got, strict=True):
                signal += energy(a)
                noise += energy(a.double() - b.double().to(a.device))
                seen = True
    if not seen:
        raise ValueError("no batch has a floating-point output: nothing to compare")
    return decibels(signal, noise)


def _call(model: Callable[..., object], item: object) -> object:
    args, kwargs = pytree.tree_map(_copied, _arguments(item))
    return model(*args, **kwargs)


def _arguments(item: Any) -> tuple[tuple[object, ...], dict[str, object]]:
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, Tensor):
        return (item,), {}
    if isinstance(item, tuple | list):
        return tuple(item), {}
    return item.args, dict(item.kwargs)


def _copied(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)


def _floating(outputs: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
