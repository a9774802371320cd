"""Memory of file-mapped tensors: give their pages back to the page cache, make new ones, measure the process.

A page that is given back stays in the page cache while the machine has room, so reading it again costs a minor fault.
Only pages that the file (or the page cache of a shared mapping) still holds are given back; a modified copy is not.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import math
import mmap
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

_MAPS, _PAGES, _STATUS = (pathlib.Path("/proc/self") / name for name in ("maps", "pagemap", "status"))
_LEAST_PAGES = 4  # fewer are not worth the look at the address space
_ENTRY = 8  # bytes of /proc/self/pagemap per page
_PRESENT, _OF_FILE = 1 << 63, 1 << 61  # of such an entry; a modified copy of a file's page is not of the file


class DiskError(OSError):
    """A disk without room for what is to be written."""


class Residency:
    """A look at the address space that many :meth:`give_back` calls share; reading it takes about a millisecond.

    It is looked at when it is needed first, and again for a tensor outside of every mapping known so far. Make a new
    one after files were mapped where ordinary memory was before: their tensors would be left alone.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._files: list[bool] = []

    def give_back(self, *tensors: Tensor) -> int:
        """Drop the pages of file-mapped tensors from this process; see :func:`give_back`."""
        if not _PAGES.exists() or _madvise() is None:
            return 0
        dropped = 0
        with _PAGES.open("rb", buffering=0) as pages:
            for tensor in tensors:
                if (span := _whole_pages(tensor)) is not None:
                    dropped += sum(_drop(pages.fileno(), *part) for part in self._mapped(*span))
        return dropped

    def mapped_bytes(self, *tensors: Tensor) -> int:
        """Bytes of pages that :meth:`give_back` looks at and that are mapped from files, in memory or not."""
        spans = [span for tensor in tensors if (span := _whole_pages(tensor)) is not None]
        return sum(end - start for span in spans for start, end in self._mapped(*span))

    def _look(self) -> None:
        if not _MAPS.exists() or _madvise() is None:
            return
        rows = [line.split(None, 5) for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()]
        spans = [[int(end, 16) for end in row[0].split("-")] for row in rows]
        self._starts, self._ends = [start for start, _ in spans], [end for _, end in spans]
        self._files = [row[4] != "0" and _is_file("".join(row[5:])) for row in rows]

    def _mapped(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of an address range that are mapped from files."""
        if not self._known(start, end):
            self._look()
        first = bisect.bisect_right(self._ends, start)
        last = bisect.bisect_left(self._starts, end)
        return [(max(start, self._starts[i]), min(end, self._ends[i])) for i in range(first, last) if self._files[i]]

    def _known(self, start: int, end: int) -> bool:
        first, last = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._starts, end)
        covered = sum(min(end, self._ends[i]) - max(start, self._starts[i]) for i in range(first, last))
        return covered == end - start


def give_back(*tensors: Tensor) -> int:
    """Drop the clean pages of file-mapped tensors from this process's memory; their values stay.

    Pages of a private mapping that were written to are kept, and so is every page that a tensor shares with its
    neighbours; fewer than four whole pages are not looked at. Nothing happens to ordinary memory, other devices, and on
    systems without ``/proc/self/pagemap``. No thread may write to the tensors meanwhile.

    Args:
        tensors: any; for many calls on the same ones make a :class:`Residency`.

    Returns:
        Bytes dropped.
    """
    return Residency().give_back(*tensors)


def trim() -> None:
    """Give the system what the allocator keeps of freed tensors; for the end of a piece of work, such as a layer.

    glibc serves tensors below 32 MB from a heap that shrinks by itself only where nothing lies above the gap. Elsewhere
    nothing happens.
    """
    if (function := _c_function("malloc_trim", ctypes.c_size_t)) is not None:
        function(0)


def mapped_tensor(path: str | os.PathLike[str], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A zero tensor in a new file whose pages can be given back; what is written to it goes to the file.

    Args:
        path: the file; one that is there is replaced, and tensors mapped from it keep what they had.
        shape: of the tensor.
        dtype: of the tensor.

    Raises:
        DiskError: the disk has no room; all of it is taken now, so that writing cannot fail later.
    """
    path, count = pathlib.Path(path), math.prod(shape)
    path.unlink(missing_ok=True)
    size = count * dtype.itemsize
    if size > (free := shutil.disk_usage(path.parent).free):
        raise DiskError(
            f"{path} needs {size / 1e9:.2f} GB and {path.parent} has {free / 1e9:.2f} GB left; choose another folder"
        )
    with path.open("xb") as file:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    if not size:
        return torch.zeros(tuple(shape), dtype=dtype)
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(tuple(shape))


def resident_bytes() -> int:
    """Memory of this process that is in RAM, mapped files included; its peak on systems without /proc."""
    return _status("VmRSS") or _usage()


def peak_resident_bytes() -> int:
    """Most memory that was in RAM since this process started, mapped files included."""
    return _status("VmHWM") or _usage()


def _status(name: str) -> int:
    """A size of /proc/self/status in bytes, 0 where there is none."""
    if not _STATUS.exists():
        return 0
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _usage() -> int:
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _is_file(path: str) -> bool:
    """Whether a mapping's path is a file's and not a device's: a driver cannot always bring a page back."""
    return path.startswith("/") and not (path.startswith("/dev/") and not path.startswith("/dev/shm/"))


def _whole_pages(tensor: Tensor) -> tuple[int, int] | None:
    """First and last address of the pages that hold nothing but the tensor and gaps between its rows."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" or not tensor.numel():
        return None
    if tensor.layout != torch.strided:
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    end = start + (last + 1) * tensor.element_size()
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    return (start, end) if end - start >= _LEAST_PAGES * mmap.PAGESIZE else None


def _drop(pagemap: int, start: int, end: int) -> int:
    """Drop what the file still holds of an address range of whole pages inside one mapping."""
    madvise = _madvise()
    assert madvise is not None
    raw = os.pread(pagemap, (end - start) // mmap.PAGESIZE * _ENTRY, start // mmap.PAGESIZE * _ENTRY)
    wanted = np.uint64(_PRESENT | _OF_FILE)
    clean = (np.frombuffer(raw, np.uint64) & wanted) == wanted
    return sum(
        (last - first) * mmap.PAGESIZE
        for first, last in _runs(clean)
        if madvise(start + first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, mmap.MADV_DONTNEED) == 0
    )


def _runs(flags: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Iterator[tuple[int, int]]:
    """Start and end of every stretch of True."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The C function, or None where there is none or pages cannot be dropped."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    return _c_function("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@functools.cache
def _c_function(name: str, *arguments: object) -> Callable[..., int] | None:
    """A function of the C library that returns an int, or None where there is none."""
    if not sys.platform.startswith("linux") or not hasattr(library := ctypes.CDLL(None), name):
        return None
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, ctypes.c_int
    call: Callable[..., int] = function
    return call
