"""The folder of a comparison: one file for each finished row, so that a killed run goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fxq.comparison.measure import Reference, Seconds
from fxq.comparison.methods import ComparisonError, Entry
from fxq.recipes import recipe_to_json
from fxq.report.data import Variant
from fxq.report.tables import plain
from fxq.runtime.reading import ReadError, read_json
from fxq.runtime.writable import whole_file, writable_folder

_ARRAYS = ("latent_mse", "teacher_forced", "forced_chunks", "chunk_mse", "psnr", "ssim")
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Store:
    """Rows on disk.

    ``settings`` hold whatever must be the same for all of them, JSON values by name; methods, widths and seeds are not
    among them: a folder can be given more of these.
    """

    folder: pathlib.Path
    settings: Mapping[str, Any]

    def open(self) -> None:
        """See that the folder can be taken; its settings are written with the first result.

        Raises:
            ComparisonError: when its rows were made with other settings, naming what differs.
            OSError: when it cannot be written.
        """
        writable_folder(self.folder)
        file = self.folder / "settings.json"
        if not file.exists():
            if any(self.folder.glob("rows/*.json")):
                raise ComparisonError(f"{self.folder} has rows and no settings.json; choose another --out")
        elif changed := _differences(_read(file), plain(self.settings)):
            raise ComparisonError(
                f"{self.folder} holds results of another setting: {'; '.join(changed)}; choose another --out"
            )

    def _write(self, file: pathlib.Path, data: object) -> None:
        for path, value in ((self.folder / "settings.json", self.settings), (file, data)):
            if path == file or not path.exists():
                with whole_file(path) as part:
                    part.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def _row(self, entry: Entry, seed: int) -> pathlib.Path:
        name = f"{entry.bits}-{entry.method}"
        safe = re.sub(r"[^a-z0-9_.-]", "-", name)[:80]
        if safe != name:
            safe += "-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        return self.folder / "rows" / f"seed-{seed}-{safe}.json"

    def _reference(self, seed: int) -> pathlib.Path:
        return self.folder / "rows" / f"full-precision-{seed}.json"

    def has_reference(self, seed: int) -> bool:
        """Whether full precision was measured on a seed's videos."""
        return self._reference(seed).exists()

    def row(self, entry: Entry, seed: int) -> tuple[Variant, Seconds] | None:
        """A finished row, or None.

        Raises:
            ComparisonError: when it was made with another recipe, naming what differs, or is damaged.
        """
        file = self._row(entry, seed)
        if not file.exists():
            return None
        data = _read(file)
        try:
            said, variant, seconds = data["recipe"], dict(data["variant"]), Seconds(**data["seconds"])
            for name in _ARRAYS:
                variant[name] = np.array(variant[name], np.float64)  # None becomes NaN
            found = Variant(**variant)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ComparisonError(f"{file} is no row of a comparison ({error}): delete it") from None
        if changed := _differences(said, plain(recipe_to_json(entry.recipe))):
            raise ComparisonError(
                f"{file} was made with another recipe: {'; '.join(changed)}; delete it, or choose another --out"
            )
        return found, seconds

    def write_row(self, entry: Entry, seed: int, variant: Variant, seconds: Seconds) -> None:
        """Keep a finished row."""
        data = {"seed": seed, "recipe": recipe_to_json(entry.recipe), "seconds": seconds, "variant": variant}
        self._write(self._row(entry, seed), data)

    def reference(self, seed: int) -> Reference:
        """Full precision on a seed's videos.

        Raises:
            ComparisonError: when it is damaged.
            OSError: when it is not there.
        """
        file = self._reference(seed)
        data = _read(file)
        try:
            return Reference(**data | {"limits": tuple(data["limits"])})
        except (KeyError, TypeError) as error:
            raise ComparisonError(f"{file} is no reference of a comparison ({error}): delete it") from None

    def write_reference(self, seed: int, reference: Reference) -> None:
        """Keep full precision on a seed's videos."""
        self._write(self._reference(seed), reference)


def _read(file: pathlib.Path) -> Any:
    try:
        return read_json(file)
    except ReadError as error:
        raise ComparisonError(f"{file}: {error}; delete it, or choose another --out") from None


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, dict | list):
        pairs = data.items() if isinstance(data, dict) else enumerate(data)
        return {k: v for key, value in pairs for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: data}


def _differences(there: Any, here: Any) -> list[str]:
    """What differs between two JSON values, in words, the first few."""
    a, b = _flat(there), _flat(here)
    names = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
    said = [
        f"{name.replace('_', ' ')} is {a.get(name, 'absent')} there, {b.get(name, 'absent')} here" for name in names
    ]
    return said[:_SHOWN] + ([f"and {len(said) - _SHOWN} more"] if len(said) > _SHOWN else [])
