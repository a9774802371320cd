"""How the numbers of a codec follow from what it stores, for kernels that read them without the codec."""

from __future__ import annotations

from typing import NamedTuple


class Numbers(NamedTuple):
    """The numbers themselves in a float dtype, float8_e4m3fn included: tensor ``x``, and ``scale`` where there is one.

    Attributes:
        tokens: that share a scale of a head; 0: no scale.
    """

    tokens: int = 0


class Blocks(NamedTuple):
    """``(code - offset) * scale [+ zero] [+ a centroid of each stage]`` in float32, in this order.

    Tensors, [B, tokens, ...] or [B, spans, ...] as the codec declares them: ``codes`` uint8 [..., heads, bytes], the
    first channel in the lowest bits; ``scale`` and ``zero`` [..., heads, head_dim / channels], one for so many tokens
    in order; ``ids`` uint8 [..., bytes] of ``heads * stages`` numbers, ``centroids`` [..., stages, heads, C, head_dim].

    Attributes:
        bits: of a code: 2, 4 or 8.
        offset: taken off a code; 0 where there are zeros.
        channels: of a head that share a scale.
        tokens: that share a scale; a divisor of the span.
        stages: centroids that are added to a number.
        centroids: to choose from in each stage.
        id_bits: of a centroid's number: 1, 2, 4 or 8.
    """

    bits: int
    offset: int
    channels: int
    tokens: int = 1
    stages: int = 0
    centroids: int = 1
    id_bits: int = 8


class Planes(NamedTuple):
    """Bit planes of coefficients, and a basis: ``basis ((code + 1/2 - 2**(width - 1)) * step) + mean``.

    Tensors: ``planes`` uint8 [B, spans, planes, bytes], the first token in the lowest bit and a coefficient's lowest
    bit in its first plane; ``mean`` [groups, width], ``basis`` [groups, width, rank], ``step`` and ``width``
    [groups, rank], with a batch before where ``shared`` is not set. A coefficient of width 0 is 0.

    Attributes:
        groups: of channels that are transformed together: the heads, or 1.
        shared: whether all videos have one basis.
    """

    groups: int
    shared: bool


Form = Numbers | Blocks | Planes
