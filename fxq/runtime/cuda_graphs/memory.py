"""Memory that graphs read and write: a piece for each place in a call, whatever the shapes that come there."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

Layout = tuple[torch.Size, tuple[int, ...] | None]
"""Shape and strides of a dense tensor; None: those of a contiguous one."""


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a copy: that of a dense tensor, or else contiguous."""
    if tensor.is_contiguous():
        return tensor.shape, None
    copied = torch.empty_like(tensor, device="meta")
    return tensor.shape, None if copied.is_contiguous() else copied.stride()


@dataclasses.dataclass(frozen=True)
class _Content:
    """The tensor that was copied, the one whose view it is, how both stood then, and the strides of the copy."""

    source: TensorWeakRef
    base: TensorWeakRef | None
    version: int
    address: int
    shape: torch.Size
    strides: tuple[int, ...]
    copied: tuple[int, ...]

    @classmethod
    def of(cls, source: Tensor, view: Tensor) -> _Content | None:
        """None where nothing tells whether a tensor was written to: it is copied in every call."""
        if source.is_inference():
            return None
        base = None if source._base is None else TensorWeakRef(source._base)
        stands = source._version, source.data_ptr(), source.shape, source.stride()
        return cls(TensorWeakRef(source), base, *stands, view.stride())

    def reach(self, other: _Content) -> tuple[int, int] | None:
        """(dimension, size) up to which ``other`` begins with this content; None where it does not."""
        if (self.version, self.address, len(self.shape)) != (other.version, other.address, len(other.shape)):
            return None
        if not self._same_memory(other):
            return None
        differing = [i for i, (a, b) in enumerate(zip(self.shape, other.shape, strict=True)) if a != b]
        dim = differing[0] if differing else 0
        if len(differing) > 1 or (differing and self.shape[:dim].numel() != 1):
            return None
        if (self.strides[dim:], self.copied[dim:]) != (other.strides[dim:], other.copied[dim:]):
            return None
        return dim, self.shape[dim] if self.shape else 0

    def _same_memory(self, other: _Content) -> bool:
        if (source := self.source()) is not None and source is other.source():
            return True
        base = None if self.base is None else self.base()
        return base is not None and other.base is not None and base is other.base()


class Memory:
    """One piece of memory at a fixed address, and what lies in it.

    Args:
        count: numbers it has room for.
        dtype: of the numbers.
        device: where it lies.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.empty(count, dtype=dtype, device=device)
        self._content: _Content | None = None

    def view(self, layout: Layout) -> Tensor:
        """A tensor at the begin of the memory."""
        shape, strides = layout
        if strides is not None:
            return self.flat.as_strided(shape, strides)
        return self.flat[: shape.numel()].view(shape)

    def fill(self, view: Tensor, source: Tensor) -> int:
        """Copy a tensor into a view of this memory, or of it what is not there yet.

        Nothing is copied where the same values lie there: the tensor, or a view of the same tensor from the same
        address on, was copied before and was not written to since (``Tensor._version``). Where it only grew, along a
        dimension with nothing but 1 before it, what was added is copied.

        Returns:
            Bytes that were copied.
        """
        if not source.numel():
            return 0
        old, new = self._content, _Content.of(source, view)
        self._content = None
        reach = None if old is None or new is None else old.reach(new)
        if reach is None or old is None:
            view.copy_(source)
            copied = source.numel()
        else:
            dim, start = reach
            added = source.shape[dim] - start if source.ndim else 0
            if added <= 0:
                self._content = old
                return 0
            tail = source.narrow(dim, start, added)
            view.narrow(dim, start, added).copy_(tail)
            copied = tail.numel()
        self._content = new
        return copied * source.element_size()


class Memories:
    """The memory of every place in a call; what a place needs more of is taken anew, for the graphs to come.

    Args:
        device: where it lies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found: dict[tuple[str, torch.dtype], list[Memory]] = {}

    def at(self, place: str, dtype: torch.dtype, count: int, *, exactly: bool = False) -> Memory:
        """The memory of a place, with room for ``count`` numbers.

        Where it has to grow it gets half as much again, so that a cache which grows step by step has few pieces; those
        it had stay for the graphs that read them.
        """
        pieces = self._found.setdefault((place, dtype), [])
        if not pieces or pieces[-1].flat.numel() < count:
            grows = bool(pieces) and pieces[-1].flat.numel() > 0 and not exactly
            pieces.append(Memory(count + count // 2 if grows else count, dtype, self._device))
        return pieces[-1]

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Let memory that is given back be taken by others only after what runs on a stream by then."""
        for pieces in self._found.values():
            for memory in pieces:
                memory.flat.record_stream(stream)

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(memory.flat.nbytes for pieces in self._found.values() for memory in pieces)
