"""Roles of Sphinx in docstrings, such as ``:func:`fxq.load```, as code that links to the reference."""

from __future__ import annotations

import inspect
import re

import fxq

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod|obj|exc):`(?P<short>~?)(?P<name>[\w.]+)`")


def public_places() -> dict[str, str]:
    """Dotted name by which docstrings call a public object or its member -> its anchor in the reference."""
    places = {}
    for name in fxq.__all__:
        value = getattr(fxq, name)
        owners = [f"fxq.{name}", name]
        if inspect.isclass(value) or inspect.isfunction(value):
            owners.append(f"{value.__module__}.{value.__qualname__}")
        members = [key for key in vars(value) if not key.startswith("_")] if _is_own_class(value) else []
        for owner in owners:
            places[owner] = f"fxq.{name}"
            places |= {f"{owner}.{key}": f"fxq.{name}.{key}" for key in members}
    return places


def _is_own_class(value: object) -> bool:
    return inspect.isclass(value) and value.__module__.startswith("fxq")


PLACES = public_places()


def without_roles(text: str) -> str:
    """The docstring with roles as code, linked where the reference has the name."""
    return _ROLE.sub(_code, text)


def _code(found: re.Match[str]) -> str:
    name = found["name"]
    shown = name.rpartition(".")[2] if found["short"] else name
    return f"[`{shown}`][{PLACES[name]}]" if name in PLACES else f"`{shown}`"
