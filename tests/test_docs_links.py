"""Pages point at what exists, the index knows every page, and messages are quoted as they are raised."""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SOURCES = ("fxq", "passes", "kernels", "export")


def prose(page: pathlib.Path) -> str:
    """The page without code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: pathlib.Path) -> set[str]:
    """What GitHub calls the page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: pathlib.Path) -> list[str]:
    return [link for link in LINK.findall(prose(page)) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name if page.parent == ROOT else f"docs/{page.name}")
def test_every_link_and_anchor_exists(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_index_names_every_page_and_picture_is_shown():
    index = set(links(DOCS / "README.md"))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= index
    shown = {link.rpartition("/")[2] for page in PAGES for link in links(page)}
    assert {picture.name for picture in DOCS.glob("*.png")} <= shown


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_files_and_folders_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(
            r"`((?:tests|benchmarks|examples|docs|passes|kernels|export)/[\w./]+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@functools.cache
def texts() -> str:
    """Every text constant of the sources, parts of f-strings apart."""
    found = []
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found += [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return "\n".join(text for text in found if isinstance(text, str))


def test_messages_are_quoted_as_they_are_raised():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 40
    missing = [part for message in quoted for part in message.split(" ... ") if part not in texts()]
    assert not missing
