"""What part a linear plays in a captured graph, by what it reads and what reads it and not by its name."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import Tensor, fx

from fxq.core.graph import LinearSite, linear_sites
from fxq.core.ir import example_value, module_path

_TOKEN_AXES = 3
"""An input of so many axes has one for tokens: batch, tokens, channels."""


def roles_of(module: fx.GraphModule) -> dict[str, frozenset[str]]:
    """Roles (:data:`fxq.core.config.ROLES`) of every layer; of one that is called several times, those of all calls.

    ``first``: no linear stands before it. ``last``: none stands behind it. ``conditioning``: of the model's inputs it
    reads only such without a token axis (time steps, pooled prompts), where the model has others too, and what it makes
    is read elsewhere in the model: a modulation that belongs to one block is part of the block.
    """
    sites = list(linear_sites(module))
    inputs = module.graph.find_nodes(op="placeholder")
    with_tokens = [node for node in inputs if _axes(node) >= _TOKEN_AXES]
    tokens = _readers(with_tokens)
    vectors = _readers(node for node in inputs if node not in with_tokens) - tokens
    linears = {site.node for site in sites}
    followers = _readers(reader for node in linears for reader in node.users)
    leaders = _sources(linears)
    root = _shared_path([site.layer for site in sites])
    found: dict[str, frozenset[str]] = {}
    for site in sites:
        conditioning = bool(tokens) and site.node in vectors and _serves_others(site, tokens, root)
        has = {"first": site.node not in followers, "last": site.node not in leaders, "conditioning": conditioning}
        roles = frozenset(role for role, holds in has.items() if holds)
        found[site.layer] = found.get(site.layer, roles) & roles
    return found


def _axes(node: fx.Node) -> int:
    value = example_value(node)
    return value.ndim if isinstance(value, Tensor) else 0


def _readers(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that is computed from them."""
    found, queue = set[fx.Node](), list(nodes)
    while queue:
        if (node := queue.pop()) not in found:
            found.add(node)
            queue += node.users
    return found


def _sources(linears: set[fx.Node]) -> set[fx.Node]:
    """Everything that goes into one of the linears."""
    found, queue = set[fx.Node](), [source for node in linears for source in node.all_input_nodes]
    while queue:
        if (node := queue.pop()) not in found:
            found.add(node)
            queue += node.all_input_nodes
    return found


def _serves_others(site: LinearSite, tokens: set[fx.Node], root: tuple[str, ...]) -> bool:
    """Whether what a layer makes meets tokens in another part of the model than its own, or meets none."""
    frontier, seen, queue = set[fx.Node](), set[fx.Node](), [site.node]
    while queue:
        if (node := queue.pop()) in tokens:
            frontier.add(node)
        elif node not in seen:
            seen.add(node)
            queue += node.users
    own = _part(site.layer, root)
    return not frontier or any(_part(module_path(node), root) != own for node in frontier)


def _part(path: str, root: tuple[str, ...]) -> str:
    """The child of ``root`` that a path leads through; empty for what lies above."""
    parts = tuple(path.split("."))
    return parts[len(root)] if parts[: len(root)] == root and len(parts) > len(root) else ""


def _shared_path(names: list[str]) -> tuple[str, ...]:
    """The modules that all names lie in."""
    paths = [name.split(".")[:-1] for name in names]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return tuple(parts[0] for parts in same)
