"""The scalar quantizer that codecs share: blocks of numbers with one scale, and one least value where asymmetric."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

ScaleDtype = Literal["float8_e4m3fn", "bfloat16"]

E4M3_LEAST, E4M3_MOST = 2.0**-9, 448.0
"""Smallest positive and largest number of float8_e4m3fn."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a block of numbers becomes codes.

    Symmetric: ``code = clamp(round(x / scale), -m, m) + m`` with ``m = 2**(bits-1) - 1`` and ``scale = max|x| / m``,
    so two bits have three levels. Asymmetric: ``code = clamp(round((x - zero) / scale), 0, 2**bits - 1)`` with
    ``scale = (max - min) / (2**bits - 1)`` and ``zero = min``. Scale and zero are rounded to their dtype first
    (Quant VideoGen, arXiv 2602.02958, and its released code).
    """

    bits: int
    asymmetric: bool = False
    scale_dtype: ScaleDtype = "float8_e4m3fn"

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits = {self.bits}: stored are 2, 4 or 8")
        if self.scale_dtype not in ("float8_e4m3fn", "bfloat16"):
            raise ValueError(f"scale_dtype = {self.scale_dtype!r}: expected 'float8_e4m3fn' or 'bfloat16'")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of scale and zero as stored."""
        return torch.bfloat16 if self.scale_dtype == "bfloat16" else torch.float8_e4m3fn

    @property
    def offset(self) -> int:
        """Code of the number 0 where symmetric, else 0."""
        return 0 if self.asymmetric else 2 ** (self.bits - 1) - 1

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Blocks along the last axis.

        Args:
            x: float32 [..., block].

        Returns:
            Codes uint8 [..., block], scale [...] and zero [...], the latter None where symmetric.

        Raises:
            ValueError: when scales do not fit float8_e4m3fn.
        """
        scale, zero = self.measured(x)
        if zero is not None:
            codes = (x - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
            return codes.round().clamp(0, 2**self.bits - 1).to(torch.uint8), scale, zero
        codes = (x / scale.float().unsqueeze(-1)).round().clamp(-self.offset, self.offset) + self.offset
        return codes.to(torch.uint8), scale, None

    def measured(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of :meth:`quantize` alone.

        Raises:
            ValueError: when they do not fit float8_e4m3fn.
        """
        return self.of_ranges(*x.aminmax(dim=-1))

    def of_ranges(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of blocks whose least and largest numbers these are.

        Raises:
            ValueError: when they do not fit float8_e4m3fn.
        """
        if not self.asymmetric:
            return self._stored(torch.maximum(high, -low) / self.offset), None
        scale = self._stored((high - low) / (2**self.bits - 1))
        return scale, low.to(torch.bfloat16) if self.scale_dtype == "bfloat16" else self._rounded(low)

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Inverse of :meth:`quantize` up to rounding, float32 [..., block]."""
        factor = scale.float().unsqueeze(-1)
        if self.asymmetric:
            assert zero is not None
            return codes.float() * factor + zero.float().unsqueeze(-1)
        return (codes.float() - self.offset) * factor

    def _stored(self, scale: Tensor) -> Tensor:
        if self.scale_dtype == "bfloat16":
            return scale.clamp_min(torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
        most = float(scale.max()) if scale.numel() else 1.0
        # Below 2**-6 numbers of the format are less than three bits exact.
        if most > E4M3_MOST or 0 < most < 2.0**-6:
            raise ValueError(
                f"the largest scale of a span is {most:.3g}: float8_e4m3fn holds {2.0**-6:.3g} to {E4M3_MOST:g} well; "
                "use scale_dtype='bfloat16'"
            )
        return scale.clamp_min(E4M3_LEAST).to(torch.float8_e4m3fn)

    @staticmethod
    def _rounded(low: Tensor) -> Tensor:
        if low.numel() and float(low.abs().max()) > E4M3_MOST:
            raise ValueError(
                f"numbers of {float(low.abs().max()):.3g} do not fit float8_e4m3fn as least values; use "
                "scale_dtype='bfloat16'"
            )
        return low.to(torch.float8_e4m3fn)
