"""Rewrite: inputs and weights of layers are rotated as ComfyUI's and SGLang's int8 kernels rotate them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxq.core.config import RecipeError
from fxq.passes.transforms.rotate import Rotate

SIZES = (256, 64, 16)
"""Channels that a rotation may have, powers of four; the largest that divides a width is taken."""


def rotation_size(width: int) -> int | None:
    """The largest of :data:`SIZES` that divides ``width``; None where none does."""
    return next((size for size in SIZES if width % size == 0), None)


def regular_hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix [size, size], orthonormal, symmetric and so its own inverse; float64.

    Its rows have one sum, so that the mean of a block does not go into one channel.

    Args:
        size: a power of four.
    """
    base = torch.ones(4, 4, dtype=torch.float64, device="cpu") - 2 * torch.eye(4, dtype=torch.float64).flip(1)
    matrix = base
    while len(matrix) < size:
        matrix = torch.kron(matrix, base)
    return matrix / size**0.5


@dataclasses.dataclass(frozen=True)
class ConvRot(Rotate):
    """:class:`~fxq.passes.transforms.rotate.Rotate` by regular Hadamard matrices of 256, 64 or 16 channels.

    The largest that divides the number of inputs is taken, ``block`` at most; a layer that none divides is left as it
    is. What these layers store, ComfyUI and SGLang read: they rotate inputs by the same matrices.

    Source: ConvRot (arXiv 2512.03673).
    """

    block: int = 256

    def __post_init__(self) -> None:
        if self.block not in SIZES:
            raise RecipeError(f"ConvRot: block = {self.block}, expected one of {', '.join(map(str, SIZES))}")

    def matrix(self, size: int) -> Tensor:
        """See :func:`regular_hadamard`."""
        return regular_hadamard(size)

    def size_of(self, width: int) -> int:
        """Channels rotated together, 1 where none are."""
        return next((size for size in SIZES if size <= self.block and width % size == 0), 1)
