"""Compiled programs are machine code: which of them this user made, and how one is loaded.

A note is an empty file named by the sha256 of a package, in a folder that this user alone can write into, beside the
cache of compiled kernels. Where there is no such folder, notes last as long as the process.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

from fxq.export.capture import ExportError
from fxq.kernels.native.cache import chosen_folder, is_own_file, why_shared
from fxq.runtime.messages import first_line
from fxq.runtime.reading import ReadError, regular_file

MAX_ENTRIES = 10_000
MAX_RATIO = 100
"""Most bytes an entry of a package unpacks to, for each of its bytes in the package; a megabyte is always fine."""
_NOTED: set[str] = set()


def _notes() -> pathlib.Path:
    return chosen_folder() / "programs"


def note_as_own(digest: str) -> None:
    """Remember a package that this process compiled."""
    _NOTED.add(digest)
    folder = _notes()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not why_shared(folder):
            os.close(os.open(folder / digest, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
    except OSError:
        return  # the process remembers it


def is_own(digest: str) -> bool:
    """Whether this user compiled the package of a hash."""
    known = re.fullmatch("[0-9a-f]{64}", digest) is not None
    return digest in _NOTED or (known and is_own_file(_notes() / digest))


def load_native(folder: pathlib.Path, name: str, digest: str, entry: str, allowed: bool) -> Callable[..., Any]:
    """Load a compiled package.

    What is loaded is a private copy, hashed while it is copied: nobody can exchange it in between.

    Args:
        folder: of the program.
        name: of the package in it.
        digest: sha256 that it must have.
        entry: name of the graph in the package.
        allowed: load it though this user did not compile it.

    Raises:
        ExportError: when it is another user's and not allowed, altered, or unpacks to too much or to elsewhere.
    """
    if not (allowed or is_own(digest)):
        raise ExportError(
            f"{folder / name} is machine code that this user did not export here; if it comes from where you would "
            "install software, load it with allow_native_code=True"
        )
    from torch._inductor.package.package import load_package

    with tempfile.TemporaryDirectory(prefix="fxq-") as scratch:
        copy = pathlib.Path(scratch) / name
        try:
            with regular_file(folder / name, folder).open("rb") as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
            with copy.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ReadError) as error:
            raise ExportError(f"{folder / name} cannot be read: {error}") from error
        if found != digest:
            raise ExportError(f"{folder / name} changed while it was loaded; load it again")
        _check_archive(copy, folder / name)
        try:
            return load_package(str(copy), entry)
        except (RuntimeError, ValueError, LookupError, OSError) as error:
            raise ExportError(
                f"{folder / name} is no compiled package with the entry {entry}: {first_line(error, 200)}"
            ) from error


def _check_archive(copy: pathlib.Path, shown: pathlib.Path) -> None:
    """Refuse entries that unpack to much more than they are, or outside the folder they are unpacked into."""
    try:
        with zipfile.ZipFile(copy) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ExportError(f"{shown} is no package of torch: {error}") from error
    if len(entries) > MAX_ENTRIES:
        raise ExportError(f"{shown} has {len(entries)} entries, at most {MAX_ENTRIES} are unpacked")
    for item in entries:
        path = pathlib.PurePosixPath(item.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in item.filename:
            raise ExportError(f"{shown} has the entry {item.filename[:80]!r}, which lies outside of it")
        if item.file_size > max(1 << 20, MAX_RATIO * item.compress_size):
            raise ExportError(f"{shown} has the entry {item.filename[:80]!r}, which unpacks to {item.file_size} bytes")
