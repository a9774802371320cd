"""Pages about what recipes hold and what operators take, read from their classes and schemas."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any

from site_links import ROOT
from site_roles import without_roles

from fxq.cache.policy import CachePolicy
from fxq.core.config import Budget, Recipe, Rule, Scheme
from fxq.kernels import OPS
from fxq.presets import PRESETS
from fxq.recipes import METHODS, TRANSFORMS

CLASSES: dict[str, type[Any]] = {
    "The recipe": Recipe,
    "A rule": Rule,
    "A scheme": Scheme,
    "A budget": Budget,
    "The cache": CachePolicy,
    **TRANSFORMS,
    **METHODS,
}
"""Heading of ``docs/recipes.md`` -> the class whose fields are the keys there."""


def recipe_page() -> dict[str, str]:
    """Path -> Markdown of the page about the keys of recipes."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    parts = [
        "# Keys of recipes",
        "",
        "Read from the classes that recipe files become; [recipes](../recipes.md) tells how to write one. Presets: "
        + ", ".join(f"`{name}`" for name in PRESETS)
        + ".",
    ]
    for heading, cls in CLASSES.items():
        if heading in (next(iter(TRANSFORMS)), next(iter(METHODS))):
            parts += ["", "## Transforms" if heading in TRANSFORMS else "## Methods"]
        level = "###" if heading in {**TRANSFORMS, **METHODS} else "##"
        title = heading if level == "###" else f"{heading}: {cls.__name__}"
        said = inspect.cleandoc(cls.__doc__ or "").split("\n\nArgs:")[0].split("\n\nRaises:")[0]
        parts += ["", f"{level} {title}", "", without_roles(said), *_keys(cls, meanings(page, heading))]
    return {"reference/recipe-keys.md": "\n".join(parts) + "\n"}


def meanings(page: str, heading: str) -> dict[str, str]:
    """Key -> its meaning in the table below a heading of the page on recipes."""
    below = page.split(f"\n## {heading}\n", 1)[-1].split("\n## ", 1)[0]
    below = re.sub(r"\]\((?=\w+\.md)", "](../", below).replace("](#", "](../recipes.md#")
    return dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| ([^|]+) \|$", below, re.MULTILINE))


def _keys(cls: type[Any], told: dict[str, str]) -> list[str]:
    fields = [field for field in dataclasses.fields(cls) if field.init]
    if not fields:
        return ["", "No options."]
    told = _arguments(cls) | told
    lines = ["", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields:
        kind = re.sub(r"\b(?:\w+\.)+", "", field.type if isinstance(field.type, str) else _name(field.type))
        default = "needed" if _needed(field) else f"`{_value(field)}`"
        kind = kind.replace(" | ", "` or `")
        lines.append(f"| `{field.name}` | `{kind}` | {default} | {told.get(field.name, '')} |")
    return lines


def _arguments(cls: type[Any]) -> dict[str, str]:
    """Field -> what the docstring says of it under ``Args``, or where it stands in the text."""
    text = inspect.cleandoc(cls.__doc__ or "")
    section = re.search(r"^Args:\n((?: .*\n?|\n)+)", text, re.MULTILINE)
    found = re.findall(r"^    (\w+): ((?:.|\n(?:     |$))+)", section[1] if section else "", re.MULTILINE)
    return {name: without_roles(" ".join(said.split())) for name, said in found}


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return repr(field.default)


def _name(kind: Any) -> str:
    return kind.__name__ if inspect.isclass(kind) and not typing.get_args(kind) else str(kind)


def operator_page() -> dict[str, str]:
    """Path -> Markdown of the page about operators."""
    parts = [
        "# Operators",
        "",
        "What quantized graphs call, as `torch.ops.fxq.NAME`. Each has a reference in PyTorch that runs everywhere "
        "and kernels for the devices named below it; `fxq doctor` checks them on your machine. How one is written: "
        "[passes](../passes.md#an-op-what-the-graph-calls).",
    ]
    for op in OPS:
        said = inspect.cleandoc(op.compute.__doc__ or "")
        parts += ["", f"## {op.name}", "", "```text", _folded(op.schema), "```", "", without_roles(_sections(said))]
        bound = (
            ", ".join(f"`{device}`" for device in sorted(op.implementations)) or "none: the reference runs everywhere"
        )
        parts += ["", f"Kernels: {bound}."]
    return {"reference/operators.md": "\n".join(parts) + "\n"}


def _folded(schema: str) -> str:
    """A schema with an argument a line."""
    name, rest = schema.split("(", 1)
    arguments, result = rest.rsplit(") -> ", 1)
    return f"{name}(\n    " + ",\n    ".join(arguments.split(", ")) + f"\n) -> {result}"


def _sections(text: str) -> str:
    """A docstring with its sections as lists; what returns is one item, however many lines it takes."""
    made: list[str] = []
    section = ""
    for line in text.splitlines():
        if head := re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields):", line):
            section = head[1]
            made += [f"**{section}**", ""]
        elif section and line.startswith("    "):
            first = made[-1] == "" or (line[4] != " " and section not in ("Returns", "Yields"))
            item = re.sub(r"^(\w+): ", r"`\1`: ", line.strip())
            made.append(f"- {item}" if first else f"  {line.strip()}")
        else:
            made.append(line)
    return "\n".join(made)
