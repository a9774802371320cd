"""Encoded keys and values in the native kernels: bit planes written, spans made dense or decoded inside attention.

The fields of a side, and what they mean, are those of ``struct Side`` in ``calls.h``. Nothing here checks that a side's
tensors hold what its fields say: who makes sides does (:mod:`fxq.kernels.attention.encoded.sides`).
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fxq.kernels.native import _Attention, _call, _Piece

ROWS, CODES, PLANES = range(3)
"""What a side's tensors are: numbers, codes of a few bits in blocks, bit planes of coefficients."""

_LONG, _INT, _POINTER = ctypes.c_long, ctypes.c_int32, ctypes.c_void_p


class _Side(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("x", _POINTER),
        *((name, _LONG) for name in ("x_batch", "x_row", "x_head", "heads", "first", "size")),
        *((name, _INT) for name in ("kind", "is_bfloat16", "bits", "offset", "id_bits")),
        *((name, _POINTER) for name in ("table", "scale", "zero", "ids", "centroids")),
        *((name, _LONG) for name in ("channels", "scale_batch", "scale_tokens", "ids_batch", "ids_row")),
        *((name, _LONG) for name in ("centroids_batch", "stages", "count")),
        *((name, _POINTER) for name in ("width", "plane", "step", "basis", "mean")),
        *((name, _LONG) for name in ("fitted", "groups", "rank", "used", "plane_bytes")),
    ]


class _Span(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *((name, _Side) for name in ("keys", "values")),
        *((name, _POINTER) for name in ("cos", "sin")),
        ("merges", _INT),
    ]


class _Unpacking(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("side", _Side),
        *((name, _POINTER) for name in ("cos", "sin", "out")),
        *((name, _LONG) for name in ("batch", "tokens", "heads")),
        *((name, _INT) for name in ("is_bfloat16", "threads")),
    ]


class _Packing(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *((name, _POINTER) for name in ("values", "step", "width", "plane", "planes")),
        *((name, _LONG) for name in ("rows", "tokens", "plane_bytes")),
        ("threads", _INT),
    ]


class Side(NamedTuple):
    """Keys or values of one span; make one with :func:`side`.

    Attributes:
        fields: as the kernels take them.
        tensors: that the fields point to.
        heads: of a token.
        size: numbers of a head.
    """

    fields: ctypes.Structure
    tensors: tuple[Tensor, ...]
    heads: int
    size: int


Tables = tuple[Tensor, Tensor] | None
"""cos and sin of the tokens that are read, float32 [tokens, size / 2] and contiguous; None: nothing is rotated."""


def side(heads: int, size: int, **fields: Tensor | int | None) -> Side:
    """A side of so many heads and numbers, by the fields that its kind has; the others are 0."""
    found = _Side(heads=heads, size=size)
    for name, value in fields.items():
        setattr(found, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return Side(found, tuple(value for value in fields.values() if isinstance(value, Tensor)), heads, size)


def unpack(x: Side, batch: int, tokens: int, dtype: torch.dtype, tables: Tables = None) -> Tensor:
    """Dense numbers [batch, tokens, heads, size] in float32 or bfloat16, rotated by tables.

    What is rotated is rounded before and after it, as in a dense cache.
    """
    out = torch.empty((batch, tokens, x.heads, x.size), dtype=dtype)
    call = _Unpacking(
        x.fields,
        *_addresses(tables),
        out.data_ptr(),
        batch,
        tokens,
        x.heads,
        dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    _call("fxq_unpack", call)
    return out


def attention_lse(
    q: Tensor,
    keys: Side,
    values: Side,
    tokens: int,
    tables: Tables,
    others: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to ``tokens`` tokens of a span, of which no more than one head is dense at a time.

    ``q`` is of a dtype that :func:`fxq.kernels.native.attends`.

    Args:
        q: queries.
        keys: of the span.
        values: of the span.
        tokens: of the span.
        tables: see :data:`Tables`.
        others: the result for other keys, contiguous; that for these is merged into its tensors.

    Returns:
        float32 [B, S, heads, size of values] and [B, S, heads, 1]; see :mod:`fxq.kernels.attention.merge`.
    """
    if others is None:
        part = torch.empty((*q.shape[:3], values.size), dtype=torch.float32)
        lse = torch.empty((*q.shape[:3], 1), dtype=torch.float32)
    else:
        part, lse = others
    span = _Span(keys.fields, values.fields, *_addresses(tables), others is not None)
    piece = _Piece(length=tokens)
    q = q if q.stride(-1) == 1 or q.shape[-1] == 1 else q.contiguous()
    call = _Attention(
        q=q.data_ptr(),
        part=part.data_ptr(),
        lse=lse.data_ptr(),
        pieces=ctypes.addressof(piece),
        piece_count=1,
        is_bfloat16=q.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        span=ctypes.addressof(span),
    )
    call.batch, call.rows, call.heads, call.size = q.shape
    call.q_batch, call.q_row, call.q_head = q.stride()[:3]
    _call("fxq_attention", call)
    return part, lse


def pack_planes(values: Tensor, step: Tensor, width: Tensor, plane: Tensor, planes: int) -> Tensor:
    """Bit planes uint8 [planes, ceil(T / 8)] of coefficients, the first token in the lowest bit.

    Args:
        values: float32 [n, T].
        step: float32 [n].
        width: uint8 [n], bits of a coefficient, 0 to 8.
        plane: int32 [n], the first plane of each; the ``width`` planes from there on are below ``planes``.
        planes: how many there are; those of no coefficient stay unwritten.
    """
    values, step, width, plane = (t.contiguous() for t in (values, step, width, plane))
    out = torch.empty((planes, -(-values.shape[1] // 8)), dtype=torch.uint8)
    pointers = [t.data_ptr() for t in (values, step, width, plane, out)]
    _call("fxq_pack_planes", _Packing(*pointers, *values.shape, out.shape[1], torch.get_num_threads()))
    return out


def _addresses(tables: Tables) -> tuple[int | None, int | None]:
    return (None, None) if tables is None else (tables[0].data_ptr(), tables[1].data_ptr())
