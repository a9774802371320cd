"""Rewrite: inputs and weights of layers are rotated block by block, which spreads outliers over their block."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxq.core.config import RecipeError
from fxq.core.ir import QuantGraph, Stage, put_tensor
from fxq.core.pipeline import Rewrite
from fxq.passes.transforms.sites import (
    Layer,
    call,
    change_inputs,
    layers_of,
    mark,
    replace_weight,
    shape_of,
    stored,
    wide,
)
from fxq.runtime.memory.residency import Residency

_ATEN = torch.ops.aten
_LARGEST = 1024


def rotation(size: int) -> Tensor:
    """A Hadamard matrix of Sylvester's form whose rows have random signs, float64 [size, size], orthonormal.

    Without the signs the mean of a block, which is large behind a GELU, would all go into its first channel.

    Args:
        size: a power of two.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    generator = torch.Generator(device="cpu").manual_seed(size)
    signs = 2 * torch.randint(2, (size, 1), generator=generator, device="cpu") - 1
    return signs * matrix / size**0.5


def block_of_width(width: int, most: int) -> int:
    """The largest power of two that divides ``width``, ``most`` (a power of two) at most."""
    return min(width & -width, most)


def rotated(weight: Tensor, matrix: Tensor) -> Tensor:
    """The weight [N, K] whose product with inputs times ``matrix`` [b, b] is that of ``weight`` with the inputs.

    ``matrix`` is orthonormal up to a factor, such as its rounding to a dtype makes, for which the weight makes up.
    """
    exact = wide(weight)
    turn = matrix.to(exact)
    blocks = exact.unflatten(1, (-1, len(turn))) @ (turn / turn[0].square().sum())
    return blocks.flatten(1).to(weight.dtype)


@dataclasses.dataclass(frozen=True)
class Rotate(Rewrite):
    """Every input x of a quantized layer becomes ``x R`` and its weight W becomes ``W R``, in blocks of channels.

    R is orthonormal, so ``(x R) (W R)^T = x W^T``. A block is the largest power of two that divides the number of
    inputs, ``block`` at most; a layer with an odd number is left as it is. Layers that read the same node read one
    rotated one. Needs no data: outlier channels are detected, and inputs calibrated, in the rotated basis.

    Registers ``<layer>.rotation`` [b, b] in the input's dtype under the first layer that reads the input. Costs a
    product of ``rows x K x b`` for each input.

    Source: QuaRot (arXiv 2404.00456), without its fusion into the layers before; in blocks, as ConvRot.
    """

    block: int = 64
    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.PLANNED
    learns: ClassVar[bool] = False
    stores: ClassVar[tuple[str, ...]] = ("rotation",)

    def __post_init__(self) -> None:
        if not 2 <= self.block <= _LARGEST or self.block & (self.block - 1):
            raise RecipeError(f"Rotate: block = {self.block}, expected a power of two from 2 to {_LARGEST}")

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers rotated."""
        module, residency = graph.module, Residency()
        layers = [layer for layer in layers_of(module).values() if self._size(layer) > 1]
        if not layers:
            return 0
        weights = {layer.name: layer.weight(module) for layer in layers}
        matrices = dict[str, Tensor]()
        for layer in layers:
            matrix = self.matrix(self._size(layer)).to(weights[layer.name].device, layer.dtype)
            matrices[layer.name] = matrix
            replace_weight(module, layer, rotated(weights[layer.name], matrix))
            residency.give_back(weights[layer.name])
            mark(layer, self.name)

        def change(before: fx.Node, x: fx.Node, layer: str) -> fx.Node:
            put_tensor(module, f"{layer}.rotation", matrices[layer])
            shape, size = shape_of(x), len(matrices[layer])
            count = weights[layer].shape[1] // size
            parts = (*shape[:-1], count, size)
            blocks = call(before, _ATEN.unflatten.int, (x, -1, [count, size]), parts)
            turned = call(
                before, _ATEN.matmul.default, (blocks, stored(before, f"{layer}.rotation", matrices[layer])), parts
            )
            return call(before, _ATEN.flatten.using_ints, (turned, -2, -1), shape)

        change_inputs(layers, change)
        return len(layers)

    def matrix(self, size: int) -> Tensor:
        """The rotation of ``size`` channels, see :func:`rotation`."""
        return rotation(size)

    def size_of(self, width: int) -> int:
        """Channels rotated together, 1 where none are."""
        return block_of_width(width, self.block)

    def _size(self, layer: Layer) -> int:
        return self.size_of(layer.plan.in_features)
