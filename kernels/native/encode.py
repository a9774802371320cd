"""What encodes a cache in the native kernels: the nearest of some centroids, and codes of blocks of channels.

Nothing here checks what it is given: who calls it does.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxq.kernels.native import _call

_LONG, _INT, _POINTER = ctypes.c_long, ctypes.c_int32, ctypes.c_void_p


class _Clusters(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *((name, _POINTER) for name in ("x", "centroids", "names", "rest", "means")),
        *((name, _LONG) for name in ("groups", "tokens", "count", "width", "x_group", "x_token")),
        ("threads", _INT),
    ]


class _Codes(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *((name, _POINTER) for name in ("x", "low", "high", "scale", "zero", "codes")),
        *((name, _LONG) for name in ("rows", "size", "channels")),
        *((name, _INT) for name in ("bits", "threads")),
    ]


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The first of the centroids at the least distance, int64 [groups, T].

    Args:
        x: float32 [groups, T, width], of any strides with a contiguous width.
        centroids: float32 [groups, C, width].
    """
    return _compared(x, centroids, None)


def nearest_and_rest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`nearest`, and ``x`` less that centroid."""
    rest = torch.empty(x.shape, dtype=torch.float32)
    return _compared(x, centroids, rest), rest


def means(x: Tensor, names: Tensor, centroids: Tensor) -> Tensor:
    """The mean of each cluster's tokens, added up in their order; a cluster without tokens keeps its centroid.

    Args:
        x: as of :func:`nearest`.
        names: int64 [groups, T], below C.
        centroids: float32 [groups, C, width].
    """
    found = torch.empty(centroids.shape, dtype=torch.float32)
    _cluster("fxq_means", x, centroids, names.contiguous(), means=found)
    return found


def _compared(x: Tensor, centroids: Tensor, rest: Tensor | None) -> Tensor:
    names = torch.empty(x.shape[:2], dtype=torch.int64)
    _cluster("fxq_nearest", x, centroids, names, rest=rest)
    return names


def _cluster(function: str, x: Tensor, centroids: Tensor, names: Tensor, **out: Tensor | None) -> None:
    x, centroids = x if x.stride(-1) == 1 else x.contiguous(), centroids.contiguous()
    groups, tokens, width = x.shape
    call = _Clusters(x=x.data_ptr(), centroids=centroids.data_ptr(), names=names.data_ptr(), groups=groups)
    for name, tensor in out.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    call.tokens, call.count, call.width, call.threads = tokens, centroids.shape[1], width, torch.get_num_threads()
    call.x_group, call.x_token = x.stride(0), x.stride(1)
    _call(function, call)


def block_ranges(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Least and largest number of each block of so many channels, float32 [..., size / channels] of float32 ``x``."""
    x = x.contiguous()
    low, high = (torch.empty((*x.shape[:-1], x.shape[-1] // channels), dtype=torch.float32) for _ in range(2))
    call = _Codes(x=x.data_ptr(), low=low.data_ptr(), high=high.data_ptr(), channels=channels)
    _run(call, x)
    return low, high


def block_codes(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Packed codes uint8 [..., ceil(size * bits / 8)], as :meth:`fxq.cache.codecs.scalar.Grid.quantize` rounds.

    Args:
        x: float32 [..., size].
        scale: float [..., size / channels], positive.
        zero: as ``scale``, or None where codes are symmetric.
        bits: 2, 4 or 8.
    """
    x, scale = x.contiguous(), scale.float().contiguous()
    zero = None if zero is None else zero.float().contiguous()
    size = x.shape[-1]
    codes = torch.empty((*x.shape[:-1], -(-size * bits // 8)), dtype=torch.uint8)
    pointers = {"scale": scale.data_ptr(), "zero": None if zero is None else zero.data_ptr(), "codes": codes.data_ptr()}
    _run(_Codes(x=x.data_ptr(), channels=size // scale.shape[-1], bits=bits, **pointers), x)
    return codes


def _run(call: _Codes, x: Tensor) -> None:
    call.rows, call.size, call.threads = x.numel() // x.shape[-1], x.shape[-1], torch.get_num_threads()
    _call("fxq_codes", call)
