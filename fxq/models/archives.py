"""Zip archives that torch and numpy write: what is in them is looked at before it is unpacked."""

from __future__ import annotations

import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fxq.runtime.reading import ReadError, regular_file

MAX_ENTRIES = 200_000
MAX_PICKLE = 256 << 20
"""Most bytes of the pickle of a torch archive: names and shapes, no data."""
MAX_RATIO = 200
"""Most bytes an array unpacks to, for each of its bytes in the archive; a megabyte is always fine."""
MAX_TIMES = 4
"""The tensors of a checkpoint may take so many times the bytes of the file, by names that share their data."""


def check_archive(path: pathlib.Path) -> None:
    """Refuse a torch archive that is packed, or whose pickle asks for memory that no tensor of it needs.

    Raises:
        OSError: when it cannot be read.
        ReadError: naming the entry.
    """
    with regular_file(path).open("rb") as file:
        try:
            if not zipfile.is_zipfile(file):
                return
        except (zipfile.BadZipFile, struct.error, OSError, ValueError) as error:
            raise ReadError(f"it is no whole zip archive: {error}") from error
        with _opened(file) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise ReadError(f"its entry {entry.filename[:80]!r} is packed, which torch.save never does")
                if entry.filename.endswith("data.pkl"):
                    if entry.file_size > MAX_PICKLE:
                        raise ReadError(f"its pickle has {entry.file_size} bytes, at most {MAX_PICKLE} are read")
                    try:
                        content = archive.read(entry)
                    except (EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
                        raise ReadError(f"its pickle is truncated or damaged: {error}") from error
                    if b"bytearray" in content:
                        raise ReadError("its pickle asks for a bytearray, which can be of any size")


def _opened(file: IO[bytes]) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, struct.error, ValueError, OSError, NotImplementedError) as error:
        raise ReadError(f"it is no whole zip archive: {error}") from error
    if len(archive.infolist()) > MAX_ENTRIES:
        raise ReadError(f"it has {len(archive.infolist())} entries, at most {MAX_ENTRIES} are read")
    return archive


def check_loaded(content: object, path: pathlib.Path) -> None:
    """Refuse tensors that claim more elements than their data has, or that are no plain tensors on the CPU.

    Raises:
        ReadError: naming the tensor.
    """
    total, room = 0, MAX_TIMES * path.stat().st_size
    stack: list[tuple[str, object]] = [("", content)]
    seen = set[int]()
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ReadError(f"{name[:120]} is a {value.layout} tensor on {value.device}, expected a dense one")
            size = value.numel() * value.element_size()
            total += size
            if size > value.untyped_storage().nbytes() or total > room:
                raise ReadError(f"{name[:120]} {list(value.shape)} claims more elements than the file has")
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            stack.extend((f"{name}.{str(key)[:80]}".removeprefix("."), item) for key, item in items)


def read_arrays(path: pathlib.Path) -> dict[str, Tensor]:
    """The arrays of an ``.npz`` file by name.

    Raises:
        OSError: when it cannot be read.
        ReadError: no such file, objects in it, or an array that claims more than it has or unpacks to too much.
    """
    found: dict[str, Tensor] = {}
    with regular_file(path).open("rb") as file, _opened(file) as archive:
        for entry in archive.infolist():
            if entry.file_size > max(1 << 20, MAX_RATIO * entry.compress_size):
                raise ReadError(f"{entry.filename[:80]} unpacks to {entry.file_size} bytes")
            try:
                with archive.open(entry) as packed:
                    found[entry.filename.removesuffix(".npy")] = _array(packed, entry)
            except (EOFError, TypeError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
                raise ReadError(f"{entry.filename[:80]}: {error}; expected plain arrays, without objects") from error
    return found


def _array(packed: IO[bytes], entry: zipfile.ZipInfo) -> Tensor:
    version = np.lib.format.read_magic(packed)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"npy version {version}, expected 1.0 or 2.0")
    shape, fortran, dtype = readers[version](packed)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    data = packed.read()
    if len(data) != dtype.itemsize * int(np.prod([int(size) for size in shape], dtype=object)):
        raise ValueError(f"{shape} of {dtype} are not the {len(data)} bytes it has")
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(np.ascontiguousarray(array).copy())
