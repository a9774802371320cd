"""Files that a stranger may have written: regular files only, read up to a limit, parsed as strict JSON.

Whatever a file says, reading it takes time and memory in proportion to its size, runs no code and opens nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import stat
from collections.abc import Iterator
from typing import Any, TypeAlias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
"""What a JSON text says."""

MAX_JSON_BYTES = 32 << 20
"""Most bytes of a JSON file or text."""
MAX_JSON_WEIGHT = 2_000_000
"""Most values of a JSON text; an object counts as four, a list as two: they take more memory."""
MAX_JSON_DEPTH = 100
"""Deepest nesting of lists and objects: what walks the result may recurse."""
MAX_STRING = 1 << 20
"""Longest string of a JSON file."""
MAX_INTEGER = 2**63 - 1
MAX_TENSORS = 100_000
MAX_RANK = 16
MAX_NAME = 512

_TOKENS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64}


class ReadError(ValueError):
    """A file that is not read: no regular file, too large, too deep, or not what its kind of file is."""


def regular_file(path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The real path of a regular file; links lead nowhere but where ``folder`` allows.

    Args:
        path: of the file; a link is followed.
        folder: where the file must lie in the end, when its name comes from a file. The folder itself may be reached
            through links. In a snapshot of a Hugging Face cache, the blobs of its repository count as inside.

    Raises:
        OSError: when it is not there.
        ReadError: a folder, device, pipe or socket, or a link out of the folder.
    """
    path = pathlib.Path(path)
    real = pathlib.Path(os.path.realpath(path, strict=True))
    if folder is not None and not any(real.is_relative_to(place) for place in _places(pathlib.Path(folder))):
        raise ReadError(f"{path.name} is a link to a place outside its folder, {real}; put the file itself there")
    if not stat.S_ISREG(os.stat(real, follow_symlinks=False).st_mode):
        raise ReadError(f"{path} is no regular file; copy the file itself there")
    return real


def _places(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    root = pathlib.Path(os.path.realpath(folder))
    yield root
    for above in root.parents:
        if above.name == "snapshots" and (above.parent / "blobs").is_dir():
            yield above.parent / "blobs"
            return


def read_bytes(
    path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, limit: int = MAX_JSON_BYTES
) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; see :func:`regular_file`.

    Raises:
        OSError: when it is not there or cannot be read.
        ReadError: when it is no regular file, larger, or changes while it is read.
    """
    real = regular_file(path, folder)
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ReadError(f"{path} is no regular file; copy the file itself there")
        if facts.st_size > limit:
            raise ReadError(f"{path} has {facts.st_size} bytes, a file of its kind has at most {limit}")
        content = file.read(facts.st_size + 1)
    if len(content) != facts.st_size:
        raise ReadError(f"{path} changes while it is read, or is no file on a disk")
    return content


def read_json(
    path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, limit: int = MAX_JSON_BYTES
) -> Any:
    """The value of a JSON file; see :func:`parse_json`.

    Raises:
        OSError: when it is not there or cannot be read.
        ReadError: as :func:`read_bytes` and :func:`parse_json`.
    """
    return parse_json(read_bytes(path, folder, limit))


def parse_json(content: str | bytes, max_string: int = MAX_STRING) -> Any:
    """The value of a JSON text within limits.

    Args:
        content: UTF-8 or text.
        max_string: longest string.

    Raises:
        ReadError: no JSON, a key twice in one object, integers beyond 64 bits, half of a surrogate pair, or a text
            beyond ``MAX_JSON_BYTES``, ``MAX_JSON_WEIGHT``, ``MAX_JSON_DEPTH`` or ``max_string``.
    """
    if len(content) > MAX_JSON_BYTES:
        raise ReadError(f"{len(content)} characters of JSON, at most {MAX_JSON_BYTES} are read")
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        _measure(text, max_string)
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ReadError:
        raise
    except ValueError as error:
        raise ReadError(f"not valid JSON ({str(error)[:200]})") from error
    return value


def _measure(text: str, max_string: int) -> None:
    depth, weight = 0, 0
    for match in _TOKENS.finditer(text):
        token = match[0]
        if token == ",":
            weight += 1
        elif token[0] == '"':
            if len(token) > max_string + 2:
                raise ReadError(f"a string of {len(token)} characters, at most {max_string} are read")
        elif token in "[{":
            depth += 1
            weight += 2 if token == "[" else 4
            if depth > MAX_JSON_DEPTH:
                raise ReadError(f"nested deeper than {MAX_JSON_DEPTH} levels")
        else:
            depth -= 1
    if weight > MAX_JSON_WEIGHT:
        raise ReadError(f"more than {MAX_JSON_WEIGHT} values")


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ReadError(f"the key {twice[:80]!r} stands twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) > MAX_INTEGER:
        raise ReadError(f"the integer {text[:24]} has more than 64 bits")
    return value


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file: dtype (the format's name), shape, and its bytes counted from the data's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """The header of a safetensors file; the data begins at ``start``."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    start: int


def read_header(path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> TensorHeader:
    """The header of a safetensors file, compared with the size of the file; no tensor is read.

    Raises:
        OSError: when it is not there or cannot be read.
        ReadError: no regular file, too large a header, or one that does not describe the file's bytes once each.
    """
    real = regular_file(path, folder)
    with open(os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        total = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if total < 8 or size > total - 8:
            raise ReadError("it is truncated, or no safetensors file")
        if size > MAX_JSON_BYTES:
            raise ReadError(f"its header has {size} bytes, at most {MAX_JSON_BYTES} are read")
        header = parse_json(file.read(size), MAX_JSON_BYTES)
    if not isinstance(header, dict):
        raise ReadError("its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ReadError("its __metadata__ is not text by name")
    if len(header) > MAX_TENSORS:
        raise ReadError(f"{len(header)} tensors, at most {MAX_TENSORS} are read")
    tensors = {name: _stored(name, entry) for name, entry in header.items()}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != offset:
            raise ReadError(f"tensor {name[:80]} begins at {tensor.begin}, expected {offset}")
        offset = tensor.end
    if 8 + size + offset != total:
        raise ReadError(f"its header describes {offset} bytes of data, it has {total - 8 - size}")
    return TensorHeader(tensors, metadata, 8 + size)


def _stored(name: str, entry: object) -> StoredTensor:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ReadError(f"{name[:80]!r} is no name of a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ReadError(f"tensor {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ReadError(f"tensor {name} has dtype {str(dtype)[:40]!r}, expected one of {', '.join(_BITS)}")
    if not _sizes(shape) or len(shape) > MAX_RANK or not _sizes(offsets) or len(offsets) != 2:
        raise ReadError(f"tensor {name} has no shape and offsets of sizes")
    begin, end = offsets
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise ReadError(f"tensor {name} is {dtype} {shape}, which are not the {end - begin} bytes it has")
    return StoredTensor(dtype, tuple(shape), begin, end)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_INTEGER for size in value)
