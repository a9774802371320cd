"""Python names, imports and commands that pages use exist."""

import ast
import functools
import importlib
import inspect
import pathlib
import re
import shlex

import pytest

import fxq_command

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
PLUGINS = {"plain", "robot", "fxq.methods", "fxq.exports", "fxq.models"}
"""Invented by docs/passes.md, or groups of entry points."""
KEYS = {"fxq.recipe"}
"""Options of ``torch.compile``."""


def blocks(page: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@functools.cache
def found(name: str) -> bool:
    """Whether a dotted name leads to a module, or through attributes or fields to something."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            if not hasattr(value, part):
                return inspect.isclass(value) and part in inspect.get_annotations(value)
            value = getattr(value, part)
        return True
    return False


@EACH_PAGE
def test_names_in_the_text_exist(page):
    names = set(re.findall(r"`(fxq(?:\.\w+)+)", page.read_text(encoding="utf-8"))) - PLUGINS - KEYS
    assert not [name for name in names if not found(name)]


@EACH_PAGE
def test_python_is_python_and_its_imports_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fxq":
                assert not [name.name for name in node.names if not found(f"{node.module}.{name.name}")]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fxq":
                assert found(f"fxq.{node.attr}"), node.attr


def commands(page: pathlib.Path) -> list[list[str]]:
    """Words of every command line that starts with fxq, continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ *(fxq [a-z].*)$", "\n".join(blocks(page, "sh")), re.MULTILINE)
    lines += re.findall(r"^    (fxq [a-z].*)$", text, re.MULTILINE) + re.findall(r"`(fxq [a-z][^`\n]*)`", text)
    return [shlex.split(line, comments=True) for line in lines]


@EACH_PAGE
def test_commands_have_their_options(page):
    for _, name, *words in commands(page):
        if name == "COMMAND":
            continue
        assert name in fxq_command.COMMANDS, name
        command = fxq_command.command(name)
        if hasattr(command, "commands"):
            assert not words or words[0].startswith("-") or words[0] in command.commands, words
            continue
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        options |= {"--help"}
        assert not [word for word in words if re.match(r"--\w", word) and word.split("=")[0] not in options], words
