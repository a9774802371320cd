"""Check sums of tensors' memory: they see edits that leave no other trace, such as through ``.data`` or ``.numpy()``.

A sum adds the memory as whole numbers by column of a matrix of 1021 columns, which no size of a layer is a multiple of,
and weighs the columns. A tensor of more than 4 MiB is summed in slices, rows of that matrix taken in turn, so that
every slice is spread over all of it.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch
from torch import Tensor

_COLUMNS = 1021
_WORD = 8  # bytes
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
SLICE = 4 << 20  # bytes


def slices(tensor: Tensor) -> int:
    """In how many slices a tensor is summed."""
    return max(1, -(-tensor.nbytes // SLICE))


def check_sum(tensor: Tensor, index: int, count: int) -> int | Tensor:
    """The sum of slice ``index`` of ``count``; int64 scalar on the tensor's device where that is not the CPU.

    Sums are comparable on one device only.

    Args:
        tensor: strided, of any dtype; one whose elements are not dense in memory is copied first.
        index: of the slice, 0 .. count - 1.
        count: number of slices.
    """
    if not tensor.is_contiguous():
        tensor = tensor.detach()
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).contiguous()
    return _on_host(tensor, index, count) if tensor.device.type == "cpu" else _on_device(tensor, index, count)


def _on_host(tensor: Tensor, index: int, count: int) -> int:
    """By numpy, on the bare memory: a few operators of torch would cost more than the sum of a small layer."""
    size = tensor.nbytes
    if not size:
        return 0
    memory = memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
    words = np.frombuffer(memory, np.uint64, size // _WORD)
    rows, rest = divmod(words.size, _COLUMNS)
    weights = _host_weights()
    total = 0
    if rows:
        columns = words[: rows * _COLUMNS].reshape(rows, _COLUMNS)[index::count].sum(0)
        total += int((columns * weights[0]).sum())
    if rest:
        total += int((words[-rest:] * weights[1, :rest]).sum())
    tail = size % _WORD
    return total + (int.from_bytes(memory[-tail:], "little") << 64 if tail else 0)


def _on_device(tensor: Tensor, index: int, count: int) -> Tensor:
    memory, weights = tensor.detach().view(-1).view(torch.uint8), _weights(tensor.device)
    word = next(dtype for dtype in _WORDS if memory.storage_offset() % dtype.itemsize == 0)
    whole = memory.numel() // word.itemsize
    words = memory[: whole * word.itemsize].view(word)
    rows = whole // _COLUMNS
    columns = words[: rows * _COLUMNS].view(rows, _COLUMNS)[index::count].sum(0, dtype=torch.int64)
    rest, tail = words[rows * _COLUMNS :], memory[whole * word.itemsize :]
    total = (columns * weights[0]).sum() + (rest * weights[1, : rest.numel()]).sum()
    return total + (tail * weights[2, : tail.numel()]).sum()


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Odd numbers int64 [3, columns], the same on every device."""
    generator = torch.Generator().manual_seed(_COLUMNS)
    return (torch.randint(-(2**62), 2**62, (3, _COLUMNS), generator=generator) * 2 + 1).to(device)


@functools.cache
def _host_weights() -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    return _weights(torch.device("cpu")).numpy().view(np.uint64)
