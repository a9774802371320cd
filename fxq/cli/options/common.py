"""What the commands share: options, and how results go to standard output."""

from __future__ import annotations

import inspect
import json
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from fxq.export.hub.client import is_repository
from fxq.export.hub.fetch import locate
from fxq.runtime.streams import emit

SeedOption = Annotated[int, typer.Option(help="Seed of prompts and noise.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def emit_json(data: object) -> None:
    """Write a result to standard output as JSON."""
    emit(json.dumps(data, indent=1))


def bundle_folder(given: pathlib.Path) -> pathlib.Path:
    """The folder of a bundle that a user named: a folder, or ``org/name`` or ``org/name@revision`` of the hub.

    Raises:
        BundleError: when the repository is not there, cannot be reached or holds what is not fetched.
    """
    name, at, revision = str(given).partition("@")
    return locate(name, revision) if at and is_repository(name) and not given.exists() else locate(str(given))


def expanding(name: str, group: Callable[..., object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command the options of ``group`` in the place of its parameter ``name``.

    The parameter gets what ``group`` makes of them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own, options = inspect.signature(command).parameters, inspect.signature(group).parameters
        hints = get_type_hints(command, include_extras=True) | get_type_hints(group, include_extras=True)

        def run(**given: Any) -> None:
            made = group(**{option: given.pop(option) for option in options})
            command(**given, **{name: made})

        parameters = [*(p for own_name, p in own.items() if own_name != name), *options.values()]
        keyword = inspect.Parameter.KEYWORD_ONLY
        typed = [p.replace(kind=keyword, annotation=hints.get(p.name, p.annotation)) for p in parameters]
        run.__signature__ = inspect.Signature(typed)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in typed}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate
