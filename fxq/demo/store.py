"""Finished modules of a demo on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping

from torch import fx

from fxq.core.config import Recipe
from fxq.export import BundleError, load, save
from fxq.recipes import recipe_to_json
from fxq.runtime.reading import ReadError, read_json
from fxq.runtime.writable import whole_file
from fxq.version import __version__


class Finished:
    """Modules that were made of recipes, each as a bundle with the seconds it took.

    Args:
        folder: where they lie; None: nowhere, and everything is made.
        settings: of the run: what was made with others is made again.
    """

    def __init__(self, folder: pathlib.Path | None, settings: Mapping[str, object]) -> None:
        self.folder, self.settings = folder, dict(settings)

    def made(self, recipe: Recipe, make: Callable[[], tuple[fx.GraphModule, float]]) -> tuple[fx.GraphModule, float]:
        """The module of a recipe and the seconds it took, from an earlier run or by ``make``.

        Raises:
            OSError, BundleError: when it cannot be written.
        """
        if self.folder is None:
            return make()
        said = json.dumps([__version__, self.settings, recipe_to_json(recipe)], sort_keys=True)
        name = f"{recipe.name.replace(' ', '-')}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"
        place, note = self.folder / name, self.folder / f"{name}.json"
        try:
            return load(place), float(str(read_json(note, self.folder)))
        except (BundleError, OSError, ReadError, ValueError):
            module, seconds = make()
            save(module, place)
            with whole_file(note) as part:
                part.write_text(json.dumps(seconds), encoding="utf-8")
            return module, seconds

    def clear(self) -> None:
        """Remove them all."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
