"""Roles of Sphinx in docstrings, such as ``:func:`fxq.load```, as code that links to the reference."""

from __future__ import annotations

import inspect
import re

import fxq

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod|obj|exc):`(?P<short>~?)(?P<name>[\w.]+)`")


_ELSEWHERE = {
    "PRESETS": "fxq.presets.PRESETS",
    "Condition": "fxq.calibration.rollout.Condition",
    "OnCall": "fxq.calibration.rollout.OnCall",
}
"""Public names of values that do not say where they are defined."""


def home(name: str) -> str:
    """Where a public name is defined, as a dotted name."""
    value = getattr(fxq, name)
    return _ELSEWHERE.get(name) or f"{value.__module__}.{value.__qualname__}"


def public_places() -> dict[str, str]:
    """Dotted name by which docstrings call a public object or its member -> its anchor in the reference."""
    places = {}
    for name in fxq.__all__:
        value = getattr(fxq, name)
        members = [key for key in vars(value) if not key.startswith("_")] if _is_own_class(value) else []
        for owner in (f"fxq.{name}", name, home(name)):
            places[owner] = f"fxq.{name}"
            places |= {f"{owner}.{key}": f"{home(name)}.{key}" for key in members}
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
