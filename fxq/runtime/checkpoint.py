"""Finished pieces of a long job as files, so that a killed run goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxq.runtime.reading import ReadError, read_header, regular_file

_LONGEST = 160  # characters of a name; file systems take 255 bytes, with what comes before and behind


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder with one safetensors file per finished piece.

    Every file carries the key of what it was made from; a file with another key, or a damaged one, does not count.
    Tensors that are read, or given back by :meth:`write`, are mapped from the file and take no memory until they are
    used.
    """

    folder: pathlib.Path

    def path(self, name: str) -> pathlib.Path:
        """The file of a piece; what file systems do not tell apart, or cannot hold, has a digest of its name."""
        plain = re.sub(r"[^a-zA-Z0-9_.-]", "_", name)
        if plain != name or name != name.lower() or len(name) > _LONGEST or name.startswith("."):
            plain = f"{plain[:_LONGEST]}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
        return self.folder / (plain.lstrip(".") + ".safetensors")

    def read(self, name: str, key: str) -> dict[str, Tensor] | None:
        """The tensors of a finished piece, or None when it is not there whole and of this key."""
        path = self.path(name)
        try:
            header = read_header(path, self.folder)
            if header.metadata.get("key") != key:
                return None
            with safe_open(regular_file(path, self.folder), "pt") as file:
                return {tensor: file.get_tensor(tensor) for tensor in header.tensors}
        except (FileNotFoundError, ReadError, SafetensorError):
            return None

    def write(self, name: str, key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Store a finished piece, whole or not at all, and return its tensors as mapped from the file.

        Raises:
            OSError: when the folder cannot be written.
        """
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        try:
            save_file({n: t.contiguous() for n, t in tensors.items()}, part, metadata={"key": key})
        except SafetensorError as error:
            part.unlink(missing_ok=True)
            raise OSError(f"cannot write {path}: {error}; free space, or choose another checkpoint directory") from None
        part.replace(path)
        stored = self.read(name, key)
        if stored is None:
            raise OSError(f"{path} changed while it was written; give each job a checkpoint directory of its own")
        return stored
