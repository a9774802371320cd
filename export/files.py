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

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


class BundleError(ValueError):
    """A bundle that cannot be written or that is missing, damaged, altered or of an unknown version."""


def sha256(path: pathlib.Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        out.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            yield part
            part.chmod(0o755)
            for file in part.iterdir():
                file.chmod(0o644)
            _swap(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot save {out}: {error}") from error


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
    """Write a safetensors file whose bytes depend on its content alone; tensors may share memory."""
    storages: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        if own.untyped_storage().data_ptr() in storages:
            own = own.clone()
        storages.add(own.untyped_storage().data_ptr())
        stored[name] = own
    save_file(stored, path, metadata=dict(metadata))
    _sort_metadata(path)


def _sort_metadata(path: pathlib.Path) -> None:
    """Order the header's metadata by key: safetensors writes several keys in random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        if len(text) > size:
            raise OSError(f"{path}: the header does not keep its length")
        file.seek(8)
        file.write(text.ljust(size))
