"""Commands that show recipes; :mod:`fxq.cli` registers them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from fxq.cli.options.common import JsonOption, emit_json
from fxq.core.config import Recipe
from fxq.job import needs_data
from fxq.presets import PRESETS
from fxq.recipes import get_recipe, recipe_to_json, recipe_to_toml
from fxq.runtime.streams import emit, stdout_console

recipe = typer.Typer(help="Show recipes: the presets, or what a recipe file comes to.", no_args_is_help=True)


@recipe.command()
def show(
    name: Annotated[str, typer.Argument(help="A preset, or a recipe file (.toml or .json).")],
    as_json: JsonOption = False,
) -> None:
    """Print a recipe as a file that can be changed and used; what it extends is written out."""
    found = get_recipe(name)
    if as_json:
        emit_json(recipe_to_json(found))
    else:
        emit(recipe_to_toml(found).rstrip("\n"))


@recipe.command(name="list")
def list_presets(as_json: JsonOption = False) -> None:
    """List the presets: bits, methods, and whether they need calibration data."""
    rows = [_row(preset) for preset in PRESETS.values()]
    if as_json:
        emit_json(rows)
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for row in rows:
        cells = map(_cell, row.values())
        table.add_row(*cells)
    stdout_console().print(table)


def _row(preset: Recipe) -> dict[str, str | bool | list[str]]:
    schemes = [rule.scheme.detail for rule in preset.rules if rule.scheme is not None]
    return {
        "name": preset.name,
        "bits": list(dict.fromkeys(schemes)),
        "methods": [type(method).__name__ for method in preset.methods],
        "weighting": preset.weighting,
        "needs_data": bool(needs_data(preset)),
    }


def _cell(value: str | bool | list[str]) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else ", ".join(value)
