"""Commands that show recipes; :mod:`fxq.cli` registers them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from fxq.core.config import Recipe
from fxq.job import needs_data
from fxq.recipes import PRESETS, get_recipe, recipe_to_json, recipe_to_toml
from fxq.runtime.streams import emit, stdout_console

app = typer.Typer(help="Show recipes: the presets, or what a recipe file comes to.", no_args_is_help=True)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A preset, or a recipe file (.toml or .json).")],
    as_json: JsonOption = False,
) -> None:
    """Print a recipe as a file that can be changed and used; what it extends is written out."""
    recipe = get_recipe(name)
    emit(json.dumps(recipe_to_json(recipe), indent=1) if as_json else recipe_to_toml(recipe).rstrip("\n"))


@app.command(name="list")
def list_presets(as_json: JsonOption = False) -> None:
    """List the presets: bits, methods, and whether they need calibration data."""
    rows = [_row(recipe) for recipe in PRESETS.values()]
    if as_json:
        emit(json.dumps(rows, indent=1))
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for row in rows:
        cells = map(_cell, row.values())
        table.add_row(*cells)
    stdout_console().print(table)


def _row(recipe: Recipe) -> dict[str, Any]:
    schemes = [rule.scheme.detail for rule in recipe.rules if rule.scheme is not None]
    return {
        "name": recipe.name,
        "bits": list(dict.fromkeys(schemes)),
        "methods": [type(method).__name__ for method in recipe.methods],
        "weighting": recipe.weighting,
        "needs_data": bool(needs_data(recipe)),
    }


def _cell(value: str | bool | list[str]) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else ", ".join(value)
