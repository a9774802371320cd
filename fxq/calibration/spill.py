"""Tensors of a call that its backward pass will ask for, put away into files that leave no trace."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from fxq.calibration.row_sample import Allocate
from fxq.runtime.memory.residency import give_back, trim

_LEAST, _MOST = 1 << 20, 1 << 26  # bytes of the first file, and of later ones, that hold several tensors


class Spill:
    """Copies of tensors in files, one after the other; a file is in memory until it is full, or is read again.

    A file goes with the last tensor that lies in it.
    """

    def __init__(self, allocate: Allocate) -> None:
        self.allocate = allocate
        self._file: Tensor | None = None
        self._used, self._room = 0, _LEAST

    def put(self, tensor: Tensor) -> Tensor:
        """A contiguous copy on the CPU, of the tensor's shape and dtype, in a file."""
        start = -(-self._used // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.numel() * tensor.element_size()
        if self._file is None or start + size > len(self._file):
            self.close()
            self._file, start = self.allocate((max(size, self._room),), torch.uint8), 0
            self._room = min(2 * self._room, _MOST)
        self._used = start + size
        return self._file[start : self._used].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def close(self) -> None:
        """Take the file that is being filled out of memory, with what the allocator keeps of tensors that are gone.

        The next tensor goes into a new one.
        """
        if self._file is not None:
            give_back(self._file)
            trim()
        self._file, self._used = None, 0
