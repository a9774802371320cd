"""Markdown as a code host reads it, made into what the site builds: links, lists and tables."""

from __future__ import annotations

import pathlib
import posixpath
import re
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[2]

MOVED = {
    "README.md": "index.md",
    "docs/README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "reporting.md",
}
"""File of the repository -> page of the site, where it is not what lies below ``docs``."""

_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")


def sources() -> dict[str, str]:
    """Page of the site -> file of the repository it is made of; generated pages are not among them."""
    files = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))] + list(MOVED)
    return {MOVED.get(file, file.removeprefix("docs/")): file for file in files}


def site_links(text: str, file: str) -> str:
    """The Markdown with links as the site has them.

    A link to a page or picture of the site leads there; one to another file of the repository, which the site does not
    hold, becomes its text and the file's path; other hosts stay as they are. A link that shows a page's file name gets
    the page's title to show. Code is left alone.

    Args:
        text: of the file.
        file: its path in the repository.
    """
    return "".join(part if part.startswith("`") else _LINK.sub(_to(file), part) for part in _CODE.split(text))


def _to(file: str) -> Callable[[re.Match[str]], str]:
    def replaced(found: re.Match[str]) -> str:
        picture, label, path, anchor = found[1], found[2], found[3], found[4] or ""
        if not path or re.match(r"[a-z]+:", path):
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        page = MOVED.get(target)
        if page is None and re.fullmatch(r"docs/[^/]+\.(md|png|svg)", target):
            page = target.removeprefix("docs/")
        if page is not None:
            shown = title(target) if label == posixpath.basename(target) else label
            return f"{picture}[{shown}]({page}{anchor})"
        return f"`{target}`" if label in (path, target) else f"{label} (`{target}`)"

    return replaced


def title(file: str) -> str:
    """The first heading of a page."""
    return (ROOT / file).read_text(encoding="utf-8").partition("# ")[2].partition("\n")[0]


def block_lines(text: str) -> str:
    """The Markdown with an empty line before each list and table, and after comments, where a code host needs none."""
    made: list[str] = []
    fenced = False
    for line in text.splitlines():
        before = made[-1] if made else ""
        fence = line.lstrip().startswith("```")
        starts = bool(_ITEM.match(line)) and not _ITEM.match(before)
        starts |= line.startswith("|") and not before.startswith("|")
        if not fenced and before.strip() and not before.startswith(" ") and (starts or before.startswith("<!--")):
            made.append("")
        made.append(line)
        fenced ^= fence
    return "\n".join(made) + "\n"
