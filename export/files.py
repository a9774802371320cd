"""Writing folders and tensor files: whole or not at all, and equal content as equal bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from fxq.dtypes import dtype_name
from fxq.runtime.memory.residency import DiskError, Residency
from fxq.runtime.reading import ReadError, read_header
from fxq.runtime.writable import writable_folder

_PIECE = 1 << 26  # most bytes of a tensor that are copied at a time
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names in the file format, in the order in which safetensors itself sorts tensors of different dtypes."""


class BundleError(ValueError):
    """A bundle that cannot be written or that is missing, damaged, altered or of an unknown version."""


def check_header(path: pathlib.Path, folder: pathlib.Path, stated: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Compare the header of a tensor file with what is stated of it, before anything of it is read.

    Args:
        path: the file.
        folder: where it must lie.
        stated: name -> dtype (torch's name) and shape.

    Raises:
        BundleError: when it cannot be read or differs.
    """
    try:
        header = read_header(path, folder)
    except (OSError, ReadError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    names = {short: dtype_name(dtype) for dtype, short in _DTYPES.items()}
    found = {name: (names.get(tensor.dtype, tensor.dtype), tensor.shape) for name, tensor in header.tensors.items()}
    if found != stated:
        wrong = [n for n in sorted({*found, *stated}) if found.get(n) != stated.get(n)]
        raise BundleError(f"{folder}: tensors differ from the manifest: {', '.join(wrong[:5])}")


def sha256(path: pathlib.Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_place(path: str | os.PathLike[str], own: Collection[str], kind: str) -> pathlib.Path:
    """The absolute path of a folder that :func:`whole_folder` may write; nothing is written.

    Raises:
        BundleError: when the place is taken by something else, or nothing can be written there.
    """
    out = pathlib.Path(path).absolute()
    if out.exists() and not out.is_dir():
        raise BundleError(f"cannot save {out}: it is a file; {kind} is a folder")
    other = {entry.name for entry in out.iterdir()} - set(own) if out.is_dir() else set()
    if other:
        raise BundleError(
            f"cannot save {out}: the folder has other content ({', '.join(sorted(other)[:3])}); "
            "choose an empty or new folder"
        )
    try:
        writable_folder(out.parent)
    except OSError as error:
        raise BundleError(f"cannot save {out}: {error}") from error
    return out


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], own: Collection[str], kind: str) -> Iterator[pathlib.Path]:
    """A folder to write into that takes the place of ``path`` once the block is left without an error.

    Args:
        path: where the folder goes; a folder there is replaced when it holds nothing but files named in ``own``.
        own: names of the files the block may write.
        kind: what the folder is, for messages: ``"a bundle"``.

    Raises:
        BundleError: when the place is taken by something else, or when writing fails; what was there is still there.
    """
    out = check_place(path, own, kind)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            yield part
            part.chmod(0o755)
            for file in part.iterdir():
                file.chmod(0o644)
                _reach_disk(file)
            _swap(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise BundleError(f"cannot save {out}: {error}") from error


def _reach_disk(file: pathlib.Path) -> None:
    """Wait until a file is on the disk: a rename may get there before the content does."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def _swap(part: pathlib.Path, out: pathlib.Path) -> None:
    """Put ``part`` in the place of ``out``; what was there comes back when that fails."""
    if not out.exists():
        part.rename(out)
        return
    old = part.with_name(part.name + ".old")
    out.rename(old)
    try:
        part.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_tensors(tensors: Mapping[str, Tensor], path: pathlib.Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content alone, one piece of a tensor after the other.

    Nothing of a dense tensor is copied, and the pages of file-mapped ones are given back as soon as they are written.

    Args:
        tensors: by name; they may share memory, be strided, mapped or on another device.
        path: the file.
        metadata: for its header, sorted by key.

    Raises:
        BundleError: a dtype that the format does not have.
        DiskError: the disk has no room; found before anything is written.
    """
    header, names = plan_file(tensors, metadata)
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    if size > (free := shutil.disk_usage(path.parent).free):
        raise DiskError(f"{path} needs {size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left; free some of it")
    residency = Residency()
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            for piece in _pieces(tensors[name].detach()):
                file.write(_bytes(piece))
            residency.give_back(tensors[name])


def plan_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The first bytes of a safetensors file, and the names of its tensors in the order of their data, which follow.

    Args:
        tensors: by name; only dtypes and shapes count, so they may be on the meta device.
        metadata: for the header, sorted by key.

    Raises:
        BundleError: a dtype that the format does not have.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise BundleError(
                f"tensor {name} is {tensor.dtype}, which a safetensors file cannot hold; expected one of "
                f"{', '.join(_DTYPES.values())}"
            )
    ranks = {dtype: i for i, dtype in enumerate(_DTYPES)}
    names = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        tensor = tensors[name]
        offsets = [offset, offset := offset + tensor.nbytes]
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, names


def _bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor in their order; a dense one in main memory is not copied."""
    flat = tensor.cpu().contiguous().flatten()
    dense = flat.as_strided(flat.shape, (1,))  # a single element may have any stride
    return dense.view(torch.uint8).numpy().data


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in parts of at most ``_PIECE`` bytes, in the order of its elements."""
    if tensor.nbytes <= _PIECE:
        yield tensor
        return
    rows = _PIECE // tensor[0].nbytes
    for part in tensor.split(max(1, rows)):
        if rows:
            yield part
        else:
            yield from _pieces(part[0])
