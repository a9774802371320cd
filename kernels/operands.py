"""What the operators of the GEMM family multiply, as operators, native kernels and their callers see it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """What every operator of the family multiplies; the arguments of :func:`dual_scale_linear` but for the dtype."""

    q: Tensor
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    offset: Tensor
    split: int
    bits: int

    @property
    def width(self) -> int:
        """Input channels K."""
        return self.q.shape[-1]

    @property
    def outputs(self) -> int:
        """Output channels N."""
        return self.offset.shape[0]
