"""Words of messages: the first line of an error, and the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def first_line(error: BaseException, most: int | None = None) -> str:
    """First line of what an error says, cut to ``most`` characters if given; its kind when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def kind_and_line(error: BaseException) -> str:
    """Kind of an error and the first line of what it says."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def close_names(name: str, known: Iterable[str], cutoff: float = 0.3) -> str:
    """``close names: a, b`` of up to three known names that resemble a name or pattern; "" without one."""
    close = difflib.get_close_matches(name.removeprefix("re:"), list(known), n=3, cutoff=cutoff)
    return f"close names: {', '.join(close)}" if close else ""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """``did you mean 'a'?`` for the known name that resembles a mistyped one most; "" without one."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else ""
