"""Which numbered block of a model a layer is in."""

from __future__ import annotations

import re


def block_of(layer: str) -> str:
    """Path of the numbered block that holds a layer, ``blocks.3`` for ``blocks.3.ffn.0``; empty outside of blocks."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", layer)
    return "" if found is None else found.group()
