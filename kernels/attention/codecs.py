"""How encoded keys and values are read: the form of a codec, and the one reader of codecs' names.

Codecs are written above this package, so whoever has them registers the reader.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fxq.kernels.attention.forms import Form

LEADING_AXES = {"token": 2, "span": 2, "video": 1, "model": 0}
"""Axes of a stored tensor before its own, by what it has slices of."""

MOST_TEXT = 2000
"""Longest text of settings."""


class StoredTensor(Protocol):
    """One tensor that a codec stores of spans of tokens."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""

    @property
    def per(self) -> str:
        """What it has slices of: ``token`` [B, T, ...], ``span`` [B, spans, ...], ``video`` [B, ...], ``model``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes after those."""


class Coefficients(NamedTuple):
    """Numbers as coefficients of few vectors: ``basis x + mean``.

    Weights of a softmax add up to 1, so the weighted sum of values is ``basis (weighted sum of x) + mean``: values are
    not decoded, and the second product of attention has ``r`` columns where it had ``head_dim``. Keys gain nothing:
    their rotary embedding, another one for each token, stands between the basis and the query.

    Attributes:
        x: float32 [B, T, heads, r].
        basis: float32 [B, heads, head_dim, r]; [1, ...] where all videos share it.
        mean: float32 [B, heads, head_dim], or [1, ...].
    """

    x: Tensor
    basis: Tensor
    mean: Tensor


def channels(x: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
    """``basis x + mean``, float32 [B, S, heads, head_dim], of ``x`` [B, S, heads, r]; see :class:`Coefficients`."""
    return (x.transpose(1, 2) @ basis.transpose(-1, -2) + mean.unsqueeze(2)).transpose(1, 2)


class SpanCodec(Protocol):
    """What reads a layer's encoded keys, or its values."""

    @property
    def rotated(self) -> bool:
        """Whether keys are stored rotated."""

    @property
    def integers(self) -> bool:
        """Whether attention multiplies the stored integers as they lie."""

    def stored(self, heads: int, head_dim: int, span: int) -> Sequence[StoredTensor]:
        """The tensors of spans of so many tokens.

        Raises:
            ValueError: when the settings do not fit.
        """

    def decode(self, tensors: Mapping[str, Tensor], heads: int, head_dim: int, span: int) -> Tensor:
        """float32 [B, T, heads, head_dim] of whole spans; keys are as they are stored, rotated or not."""

    def coefficients(self, tensors: Mapping[str, Tensor], heads: int, head_dim: int, span: int) -> Coefficients | None:
        """What :meth:`decode` gives, before it is multiplied by a basis; None where there is no shorter form."""

    def form(self, heads: int, head_dim: int, span: int) -> Form | None:
        """How kernels read the tensors; None: :meth:`decode` alone does."""


Codecs = tuple[SpanCodec | None, SpanCodec | None]
"""Of keys and of values; None: they are not encoded."""

Reader = Callable[[str], Codecs]
"""Codecs from the text of their settings; ValueError where there are none such."""

_READERS: list[Reader] = []


def register(reader: Reader) -> Reader:
    """Read codecs by this function from now on."""
    _READERS[:] = [reader]
    codecs_of.cache_clear()
    return reader


@functools.lru_cache(maxsize=256)
def codecs_of(text: str) -> Codecs:
    """The codecs that a text names.

    Raises:
        ValueError: when it names none, or is too long to be such a text.
    """
    if not _READERS:
        raise ValueError("no codec is known: import fxq.cache.named")
    if len(text) > MOST_TEXT:
        raise ValueError(f"the settings of the codecs have {len(text)} characters, at most {MOST_TEXT}")
    return _READERS[0](text)
