"""The page about the command line: every command with its arguments, options and defaults, read from the commands."""

from __future__ import annotations

import enum
import inspect
import pathlib
import re
import types
import typing
from typing import Any

import typer.models

import fxq_command

_WORDS = {str: "text", int: "integer", float: "number", pathlib.Path: "path", bool: "flag"}


def command_page() -> dict[str, str]:
    """Path -> Markdown of the page."""
    parts = [
        "# Command line",
        "",
        "`fxq --help` lists the commands, `fxq COMMAND --help` shows what stands here, `fxq --version` the version.",
        "",
        "| command | what it does |",
        "| --- | --- |",
    ]
    parts += [f"| [`fxq {name}`](#fxq-{name}) | {_cell(told)} |" for name, (_, told) in fxq_command.COMMANDS.items()]
    for name in fxq_command.COMMANDS:
        command = fxq_command.command(name)
        parts += ["", f"## fxq {name}", "", *_described(command, f"fxq {name}", 3)]
    return {"reference/commands.md": "\n".join(parts) + "\n"}


def _described(command: Any, name: str, level: int) -> list[str]:
    lines = [inspect.cleandoc(command.help or ""), ""]
    inner = getattr(command, "commands", None)
    if inner is not None:
        for key, part in inner.items():
            lines += [f"{'#' * level} {name} {key}", "", *_described(part, f"{name} {key}", level + 1), ""]
        return lines
    hints = typing.get_type_hints(command.callback, include_extras=True)
    arguments = [each for each in command.params if not each.opts[0].startswith("-")]
    options = [each for each in command.params if each.opts[0].startswith("-") and not getattr(each, "hidden", False)]
    usage = " ".join(_usage(each) for each in arguments)
    lines += ["```text", f"{name} {usage} [OPTIONS]".replace("  ", " "), "```", ""]
    if arguments or options:
        lines += ["| argument or option | takes | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(each, hints.get(each.name)) for each in arguments + options]
    return lines


def _usage(argument: Any) -> str:
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _row(parameter: Any, hint: Any) -> str:
    spelled = [*parameter.opts, *parameter.secondary_opts]
    if not spelled[0].startswith("-"):
        spelled = [parameter.name.upper()]
    takes = takes_of(hint) + (", several" if parameter.multiple or parameter.nargs == -1 else "")
    names = ", ".join(f"`{each}`" for each in spelled)
    default = "needed" if parameter.required else _default(parameter.default)
    return f"| {names} | {takes} | {default} | {_cell(parameter.help or '')} |"


def takes_of(hint: Any) -> str:
    """What a parameter with a type takes, in words: "integer, at least 1"."""
    kind, info = hint, None
    if typing.get_origin(hint) is typing.Annotated:
        kind, *rest = typing.get_args(hint)
        info = next((each for each in rest if isinstance(each, typer.models.ParameterInfo)), None)
    return _kind(kind) + _limits(info)


def _kind(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType, list, tuple):
        inner = {_kind(each) for each in typing.get_args(kind) if each not in (type(None), ...)}
        return " or ".join(sorted(inner))
    if origin is typing.Literal:
        return ", ".join(f"`{each}`" for each in typing.get_args(kind))
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return ", ".join(f"`{each.value}`" for each in kind)
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _limits(info: typer.models.ParameterInfo | None) -> str:
    low, high = getattr(info, "min", None), getattr(info, "max", None)
    if low is not None and high is not None:
        return f", {low} to {high}"
    return f", at least {low}" if low is not None else f", at most {high}" if high is not None else ""


def _default(value: Any) -> str:
    if callable(value) or value is None or value is False or value in ([], (), ""):
        return "-"
    value = value.value if isinstance(value, enum.Enum) else value
    return "on" if value is True else f"`{', '.join(map(str, value)) if isinstance(value, list | tuple) else value}`"


def _cell(text: str) -> str:
    """A text of the command line in a table: no part of it is markup."""
    return re.sub(r"([|\[\]])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")
