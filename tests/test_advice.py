"""What messages name exists: attributes of fxq, commands, options, environment variables, keywords of functions."""

import ast
import functools
import pathlib
import re

import fxq
import fxq_command

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(file for room in ("fxq", "passes", "kernels", "export") for file in (ROOT / room).rglob("*.py"))
ELSEWHERE = {"--version", "--query-gpu", "--format"}
"""Options of other programs that fxq runs."""


def texts(tree):
    """String literals that are no docstrings; parts that are filled in are left out."""
    docs = {
        id(node.value)
        for body in (n.body for n in ast.walk(tree) if hasattr(n, "body") and isinstance(n.body, list))
        for node in body
        if isinstance(node, ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


@functools.cache
def trees():
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


@functools.cache
def messages():
    return [text for name, tree in trees().items() if not name.startswith("fxq/report/") for text in texts(tree)]


def found(pattern):
    return sorted({name for text in messages() for name in re.findall(pattern, text)})


def resolves(name):
    """Whether a dotted name leads somewhere from fxq: an attribute, a module, or a module's attribute."""
    value = fxq
    for i, part in enumerate(parts := name.split(".")):
        if not hasattr(value, part):
            path = ROOT / "fxq" / "/".join(parts[: i + 1])
            return path.is_dir() or path.with_suffix(".py").is_file()
        value = getattr(value, part)
    return True


def test_there_is_advice_to_try():
    assert len(found(r"\bfxq\.([a-z_]+)\b")) > 10 and len(found(r"(?<![\w-])--[a-z][a-z0-9-]+")) > 10


def test_functions_of_fxq_that_messages_call_exist():
    named = found(r"\bfxq\.([a-z_]+(?:\.[a-z_]+)*)\(")
    assert named and not [name for name in named if not resolves(name)]


def test_commands_that_messages_name_exist():
    assert {"bench", "quantize"} <= set(found(r"`fxq ([a-z]+)")) <= set(fxq_command.COMMANDS)


def test_options_that_messages_name_exist():
    named = set(found(r"(?<![\w-])--[a-z][a-z0-9-]+")) - ELSEWHERE
    commands = [fxq_command.command(name) for name in fxq_command.COMMANDS]
    parameters = [parameter for command in commands for parameter in command.params]
    declared = {option for one in parameters for option in (*one.opts, *one.secondary_opts)}
    assert named <= declared, f"no command has {sorted(named - declared)}"


def test_environment_variables_that_messages_name_are_read():
    sources = "\n".join(file.read_text(encoding="utf-8") for file in FILES)
    for name in found(r"\bFXQ_[A-Z_]+\b"):
        constants = re.findall(rf'^(\w+) = "{name}"', sources, re.MULTILINE)
        reads = "|".join([f'"{name}"', *constants])
        assert re.search(rf"environ(?:\.get\(|\[)\s*(?:\w+\.)?(?:{reads})", sources), f"nothing reads {name}"


def test_keywords_that_messages_tell_to_pass_exist():
    named = set(found(r"(?:[Pp]ass|allow|with|without) ([a-z_]{3,})=(?![=<>])"))
    functions = [n for tree in trees().values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    keywords = {a.arg for f in functions for a in (*f.args.args, *f.args.kwonlyargs)}
    assert named and named <= keywords | {"options"}, sorted(named - keywords)
