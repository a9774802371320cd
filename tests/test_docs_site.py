"""The site: every page has its place, the reference has every name, and links lead somewhere."""

import dataclasses
import importlib.util
import pathlib
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest
import yaml

import fxq
import fxq_command
from fxq.kernels import OPS
from fxq.recipes import METHODS, TRANSFORMS

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "site"))

import site_commands  # noqa: E402
import site_links  # noqa: E402
import site_python  # noqa: E402
import site_recipes  # noqa: E402
import site_roles  # noqa: E402


class Settings(yaml.SafeLoader):
    """Reads mkdocs.yml, functions left out."""


Settings.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
SETTINGS = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Settings)
REFERENCE = {
    **site_python.python_pages(),
    **site_commands.command_page(),
    **site_recipes.recipe_page(),
    **site_recipes.operator_page(),
}


def pages(nav):
    """Every page below a part of the nav."""
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else pages(value)


def test_every_page_is_in_the_nav_once():
    listed = sorted(pages(SETTINGS["nav"]))
    assert listed == sorted([*site_links.sources(), *REFERENCE])
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= set(site_links.sources().values())


def test_the_nav_has_these_parts():
    parts = [next(iter(part)) for part in SETTINGS["nav"]]
    assert parts == ["Start", "Tutorials", "How-to", "Reference", "Explanation", "Results", "Project"]


def test_every_public_name_is_on_one_page_of_the_reference():
    named = [name for page in site_python.PAGES for name in site_python.names_on(page)]
    assert sorted(named) == sorted(fxq.__all__)
    text = "\n".join(REFERENCE.values())
    assert all(text.count(f"[](){{#fxq.{name}}}") == 1 for name in fxq.__all__)
    assert all(f"| [`fxq.{name}`][fxq.{name}] | " in REFERENCE["reference/index.md"] for name in fxq.__all__)


@pytest.mark.parametrize("name", fxq.__all__)
def test_a_name_has_a_home_that_is_the_public_object(name):
    module, _, attribute = site_roles.home(name).rpartition(".")
    assert getattr(sys.modules[module], attribute) is getattr(fxq, name)
    assert site_python.first_sentence(name).endswith(".")


def sections(command, name):
    """(name, parameters) of a command and those below it."""
    if hasattr(command, "commands"):
        for key, part in command.commands.items():
            yield from sections(part, f"{name} {key}")
    else:
        yield name, command.params


@pytest.mark.parametrize("name", fxq_command.COMMANDS)
def test_every_option_of_a_command_is_in_the_reference(name):
    page = REFERENCE["reference/commands.md"]
    for title, parameters in sections(fxq_command.command(name), f"fxq {name}"):
        (below,) = re.findall(rf"^#+ {title}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
        for parameter in parameters:
            spelled = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name.upper()
            (row,) = re.findall(rf"^\| (`{spelled}`.*) \|$", below, re.MULTILINE)
            assert len(re.split(r"(?<!\\)\|", row)) == 4, row
            if not parameter.required and type(parameter.default) in (int, float, str):
                assert f"| `{parameter.default}` |" in row


@pytest.mark.parametrize(
    ("hint", "words"),
    [(int | None, "integer"), (list[pathlib.Path], "path"), (bool, "flag"), (float | str, "number or text")],
)
def test_types_of_options_are_said_in_words(hint, words):
    assert site_commands.takes_of(hint) == words


def test_every_key_of_a_recipe_has_its_default_and_meaning():
    page = REFERENCE["reference/recipe-keys.md"]
    assert set(METHODS) | set(TRANSFORMS) <= set(site_recipes.CLASSES)
    for heading, cls in site_recipes.CLASSES.items():
        (below,) = re.findall(rf"^#+ {heading}(?:: \w+)?\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
        rows = dict(re.findall(r"^\| `(\w+)` \| `.+` \| .+ \| (.+) \|$", below, re.MULTILINE))
        assert list(rows) == [field.name for field in dataclasses.fields(cls) if field.init], heading
        assert all(len(meaning) > 5 for meaning in rows.values()), rows


def test_every_operator_has_its_schema():
    page = REFERENCE["reference/operators.md"]
    for op in OPS:
        (schema,) = re.findall(rf"^## {op.name}\n\n```text\n(.*?)```", page, re.MULTILINE | re.DOTALL)
        assert re.sub(r"\s", "", schema) == re.sub(r"\s", "", op.schema)


def test_no_role_is_left_in_the_reference():
    assert not re.findall(r":[a-z]+:`", "\n".join(REFERENCE.values()))


@pytest.mark.parametrize("page", REFERENCE)
def test_a_generated_page_links_to_headings_that_are_there(page):
    def anchors(text):
        said = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in said}

    for path, anchor in re.findall(r"(?<!\\)\]\(([^)#:]*)#([^)]+)\)", REFERENCE[page]):
        target = REFERENCE[page] if not path else (ROOT / "docs" / "reference" / path).resolve().read_text("utf-8")
        assert anchor in anchors(target), f"{path}#{anchor}"


def test_texts_of_the_command_line_are_no_markup_in_a_table():
    assert site_commands._cell("a [b] [c][d] | <x>") == r"a \[b\] \[c\]\[d\] \| &lt;x>"


def test_roles_become_code_and_links():
    said = site_roles.without_roles("See :func:`fxq.load`, :class:`~fxq.core.config.Recipe`, :mod:`fxq.cpu`, ``x``.")
    assert said == "See [`fxq.load`][fxq.load], [`Recipe`][fxq.Recipe], `fxq.cpu`, ``x``."
    assert site_roles.without_roles(":meth:`Recipe.decide`") == "[`Recipe.decide`][fxq.core.config.Recipe.decide]"


@pytest.mark.parametrize(
    ("file", "text", "made"),
    [
        ("README.md", "[a](docs/speed.md#what)", "[a](speed.md#what)"),
        ("README.md", "![a](docs/tiny_samples.png)", "![a](tiny_samples.png)"),
        ("docs/README.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/cache.md", "[a](README.md)", "[a](overview.md)"),
        ("docs/cache.md", "[recipes.md](recipes.md#a-rule)", "[Recipes](recipes.md#a-rule)"),
        ("docs/security.md", "[a](../SECURITY.md)", "[a](reporting.md)"),
        ("docs/passes.md", "[a pass](../passes/line.py)", "a pass (`passes/line.py`)"),
        ("docs/passes.md", "[passes/line.py](../passes/line.py)", "`passes/line.py`"),
        ("docs/passes.md", "[a](https://a.org/b) [b](#c)", "[a](https://a.org/b) [b](#c)"),
        ("docs/passes.md", "`x[0](../passes)`", "`x[0](../passes)`"),
        ("docs/passes.md", "```py\nx[0](../passes)\n```", "```py\nx[0](../passes)\n```"),
    ],
)
def test_links_lead_to_pages_of_the_site_or_become_text(file, text, made):
    assert site_links.site_links(text, file) == made


def test_sections_of_docstrings_become_lists():
    said = "A.\n\nArgs:\n    x: one\n        line.\n    y: two.\n\nReturns:\n    A result\n    of two lines."
    made = "A.\n\n**Args**\n\n- `x`: one\n  line.\n- `y`: two.\n\n**Returns**\n\n- A result\n  of two lines."
    assert site_recipes._sections(said) == made


def test_lists_and_tables_get_the_line_that_they_need():
    said = "a\n- b\n  c\n- d\n\n<!-- x -->\n| a |\n| - |\n```sh\na\n- b\n```\n"
    made = "a\n\n- b\n  c\n- d\n\n<!-- x -->\n\n| a |\n| - |\n```sh\na\n- b\n```\n"
    assert site_links.block_lines(said) == made


def test_make_builds_strictly_and_counts_every_kind_of_fault():
    assert re.search(r"-m mkdocs build --strict$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    kinds = SETTINGS["validation"]
    assert {*kinds["nav"].values(), *kinds["links"].values()} == {"warn"}
    assert {"omitted_files", "not_found"} <= set(kinds["nav"]) and {"anchors", "not_found"} <= set(kinds["links"])


def dead(site):
    """Links and sources that lead out of the site or to nothing in it."""
    ids = {page: set(re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8"))) for page in site.rglob("*.html")}
    for page in ids:
        if page.name == "404.html":
            continue
        for tag, link in re.findall(r'<(\w+)[^>]*? (?:href|src)="([^"]*)"', page.read_text(encoding="utf-8")):
            if "://" in link:
                if tag != "a":
                    yield f"{page.name}: {tag} {link}"
                continue
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            there = not anchor or anchor.startswith("__") or anchor in ids.get(target, {anchor})
            if not link.startswith("data:") and not (target.is_file() and there):
                yield f"{page.name}: {link}"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_no_dead_link(tmp_path):
    missing = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the site needs {', '.join(missing)}: make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    assert list(dead(tmp_path / "site")) == []
    assert (tmp_path / "site" / "search" / "search_index.js").stat().st_size > 100_000
    text = "\n".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site" / "reference").glob("*.html"))
    assert not [name for name in fxq.__all__ if f'id="fxq.{name}"' not in text]
