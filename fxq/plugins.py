"""What other distributions add to fxq by entry points: methods, export targets, models and metrics, by name.

Metadata is read when a name is asked for, and a plug-in is imported only when its own name is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any

METHODS, EXPORTS, MODELS, METRICS = "fxq.methods", "fxq.exports", "fxq.models", "fxq.metrics"
_KINDS = {METHODS: "method", EXPORTS: "export target", MODELS: "model", METRICS: "metric"}
GROUPS = tuple(_KINDS)


class PluginError(ValueError):
    """A plug-in that cannot be imported, is not what its group holds, or whose name is another's too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plugin:
    """An entry point: its name in a group, what it points to, and the distribution that it comes with."""

    group: str
    name: str
    target: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{_KINDS[self.group]} {self.name!r} ({self.target}) of {self.distribution} {self.version}"

    def load(self) -> Any:
        """Import what the entry point names: a method's class, or the function of a target, a model or a metric.

        Raises:
            PluginError: naming the distribution, when the import fails or gives something else.
        """
        try:
            found = EntryPoint(self.name, self.target, self.group).load()
        except Exception as error:  # whatever the import of foreign code raises is the finding
            told = (str(error).splitlines() or [""])[0]
            raise PluginError(f"{self} cannot be imported: {type(error).__name__}: {told}") from error
        if fault := _fault(self, found):
            raise PluginError(f"{self} {fault}")
        return found


def plugins(group: str) -> tuple[Plugin, ...]:
    """The plug-ins of one of :data:`GROUPS` that are installed, by name; none is imported."""
    found = (
        Plugin(
            group=group,
            name=entry.name,
            target=entry.value,
            distribution=entry.dist.name if entry.dist else "an unnamed distribution",
            version=entry.dist.version if entry.dist else "",
        )
        for entry in entry_points(group=group)
    )
    return tuple(sorted(found, key=lambda plugin: (plugin.name, plugin.distribution)))


def names(group: str) -> tuple[str, ...]:
    """Names of the installed plug-ins of a group."""
    return tuple(dict.fromkeys(plugin.name for plugin in plugins(group)))


def find(group: str, name: str, shipped: Collection[str]) -> Plugin | None:
    """The plug-in of a name; None when no distribution has one, which for a shipped name is as it should be.

    Args:
        group: one of :data:`GROUPS`.
        name: as in a recipe or on the command line.
        shipped: the names that fxq has itself.

    Raises:
        PluginError: when the name is one of fxq's own and of a plug-in, or of two plug-ins.
    """
    found = [plugin for plugin in plugins(group) if plugin.name == name]
    if clash := _clash(found, name in shipped):
        raise PluginError(clash)
    return found[0] if found else None


def fault_of(plugin: Plugin, shipped: Collection[str]) -> str:
    """Why a plug-in cannot be used, or ""; imports it."""
    same = [other for other in plugins(plugin.group) if other.name == plugin.name]
    if clash := _clash(same, plugin.name in shipped):
        return clash
    try:
        plugin.load()
    except PluginError as error:
        return str(error)
    return ""


def _clash(found: list[Plugin], shipped: bool) -> str:
    """What is wrong when several things have one name, or ""."""
    owners = ["fxq itself"] * shipped + [f"{plugin.distribution} {plugin.version}" for plugin in found]
    if not found or len(owners) == 1:
        return ""
    return (
        f"the name of {_KINDS[found[0].group]} {found[0].name!r} is taken by {' and by '.join(owners)}: uninstall all "
        "but one, or have it renamed"
    )


def _fault(plugin: Plugin, found: object) -> str:
    """Why what an entry point led to is not of its group, or ""."""
    if plugin.group != METHODS:
        return "" if callable(found) and not isinstance(found, type) else f"is {found!r}, expected a function"
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and hasattr(found, "apply")):
        return "is no dataclass with apply(problem, update)"
    if found.__name__ != plugin.name:
        return f"is the class {found.__name__}: recipes write a method's class, so the entry point has its name"
    return ""
