"""Whether results can be written where they are to go, found before the work instead of after it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator


def writable_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a folder that can be made, or written to if it exists; it is not made.

    Raises:
        OSError: when it cannot be.
    """
    folder = pathlib.Path(path)
    existing = folder.absolute()
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: {existing} is not a folder; choose another place")
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"fxq")
            probe.flush()
            with contextlib.suppress(OSError):  # not every file system can
                os.fsync(probe.fileno())
    except OSError as error:
        kind = type(error)
        raise kind(f"cannot write to {folder}: {error.strerror or error}; choose another place") from error
    return folder


def writable_file(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a file that can be written or replaced; nothing is written.

    Raises:
        OSError: when it cannot be.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"cannot write {file}: it is a folder; name a file")
    if not file.exists() or file.is_file():
        writable_folder(file.parent)
    if file.exists() and not os.access(file, os.W_OK):
        raise PermissionError(f"cannot write {file}: no permission; choose another place")
    return file


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A file to write beside ``path`` that takes its place once the block is left without an error, and else goes.

    Folders above it are made. Readers see the old file or the whole new one.

    Raises:
        OSError: when it cannot be written.
    """
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    os.close(handle)
    part = pathlib.Path(name)
    try:
        yield part
        part.chmod(0o644)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
