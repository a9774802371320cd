"""What mkdocs calls while it builds the site: pages that lie elsewhere or are generated, and links."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from mkdocs.structure.files import File

HERE = pathlib.Path(__file__).resolve().parent
for _folder in (HERE, HERE.parents[1]):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from site_commands import command_page  # noqa: E402
from site_links import MOVED, ROOT, block_lines, site_links, sources  # noqa: E402
from site_python import python_pages  # noqa: E402
from site_recipes import operator_page, recipe_page  # noqa: E402


def generated() -> dict[str, str]:
    """Path -> Markdown of every page that is made of code."""
    return {**python_pages(), **command_page(), **recipe_page(), **operator_page()}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie at the root of the repository and those that are generated."""
    if (index := files.get_file_from_path("README.md")) is not None:
        files.remove(index)
    for file, page in MOVED.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    for page, text in generated().items():
        files.append(File.generated(config, page, content=text))
    for asset in ("iframe-worker.js", "fxq.css"):
        files.append(File.generated(config, f"assets/{asset}", abs_src_path=str(HERE / asset)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links and lists of pages that a code host shows too."""
    file = sources().get(page.file.src_uri)
    return markdown if file is None else block_lines(site_links(markdown, file))
