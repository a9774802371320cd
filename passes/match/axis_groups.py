"""Which axes of a graph's tensors must share an order, so that reordering one is free or why it is not.

An axis is a dimension of a stored tensor or of a node's value. Axes that an operator matches element by element form a
group (a connected component of an undirected graph); reshapes make an axis the product of others. The order of a group
can change when no member is pinned by an input, an output or an operator that looks at positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxq.core.ir import example_value, get_tensor


class Axis(NamedTuple):
    """A dimension of a stored tensor (by name) or of a node's value; ``start`` > 0 for a later part of joint rows."""

    owner: fx.Node | str
    dim: int
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Product:
    """``parent`` runs over the combinations of ``children``, the last fastest; ``where`` names the reshape."""

    parent: int
    children: tuple[int, ...]
    where: str


@dataclasses.dataclass(frozen=True)
class AxisGroups:
    """Groups of axes by number.

    ``members`` lists the axes of each group, ``sizes`` their length (None: not fixed), ``pins`` why a group's order is
    fixed, ``products`` how groups are made of others and ``readers`` the ``quantize_act`` nodes that read a group as
    their channels; they can gather, so they allow every order.
    """

    members: list[list[Axis]]
    sizes: list[int | None]
    pins: dict[int, str]
    products: list[Product]
    readers: dict[int, list[fx.Node]]
    number: dict[Axis, int]

    def stored(self, group: int) -> list[tuple[str, int, int]]:
        """(name, dimension, start) of the stored tensors in a group."""
        return [(axis.owner, axis.dim, axis.start) for axis in self.members[group] if isinstance(axis.owner, str)]

    def reorder(self, group: int, order: Tensor) -> dict[int, Tensor] | str:
        """What follows from a new order of a group.

        Args:
            group: number of the group.
            order: int64 permutation [size]; place i gets what was at ``order[i]``.

        Returns:
            The order of every group that must change with it, or why the order cannot change.
        """
        # Along the products from group to group, until no order asks for another one.
        orders, todo = {group: order}, [group]
        while todo:
            here = todo.pop()
            # What is pinned may still be asked for the order that it has.
            if here in self.pins and not _is_identity(orders[here]):
                return self.pins[here]
            for product in self.products:
                found = self._step(product, here, orders)
                if isinstance(found, str):
                    return found
                for other, wanted in found.items():
                    if other not in orders:
                        orders[other] = wanted
                        todo.append(other)
                    elif not torch.equal(orders[other], wanted):
                        return f"{product.where} needs two orders of it at once"
        return {number: order for number, order in orders.items() if not _is_identity(order)}

    def _step(self, product: Product, here: int, orders: dict[int, Tensor]) -> dict[int, Tensor] | str:
        """Orders that a product asks of its other members once ``here`` has one."""
        sizes = [size for child in product.children if (size := self.sizes[child]) is not None]
        if here != product.parent and here not in product.children:
            return {}
        # A group times itself: its one order would have to fit both places.
        if len(set(product.children)) < len(product.children):
            return f"{product.where} reshapes it by two axes of one order"
        if len(sizes) < len(product.children):
            return f"{product.where} reshapes it by a size that is not fixed"
        # Down: the order of the whole must be one of blocks, of places within them, or of both.
        if here == product.parent:
            parts = factor(orders[here], sizes)
            if parts is None:
                return f"{product.where} splits it into {sizes[0]} parts that the order does not keep whole"
            return dict(zip(product.children, parts, strict=True))
        # Up: a parent that has an order compares it with those of its children in its own step.
        if product.parent in orders:
            return {}
        return {
            product.parent: expand(
                [orders.get(child, torch.arange(n)) for child, n in zip(product.children, sizes, strict=True)]
            )
        }


def _is_identity(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order)))


def expand(orders: Sequence[Tensor]) -> Tensor:
    """The order of a product whose factors have these orders."""
    # [n1], [n2] -> [n1 n2]: place (i, j) of the product gets what was at (first[i], second[j]).
    total = torch.zeros(1, dtype=torch.int64)
    for order in orders:
        total = (total.unsqueeze(-1) * len(order) + order).flatten()
    return total


def factor(order: Tensor, sizes: Sequence[int]) -> list[Tensor] | None:
    """Orders of the factors, inverse of :func:`expand`; None where the order mixes them."""
    grid, parts = order.reshape(*sizes), []
    for dim, size in enumerate(sizes):
        # One line through the grid, [size]; its digit at this place is the factor's order if there is one.
        line = grid.movedim(dim, 0).reshape(size, -1)[:, 0]
        parts.append(line // math.prod(sizes[dim + 1 :]) % size)
    return parts if torch.equal(expand(parts), order) else None


def known(fact: bool) -> bool:
    """Whether a comparison of sizes holds whatever the free ones are."""
    return bool(statically_known_true(fact))


class AxisBuilder:
    """Collects ties, pins and products node by node."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.ties = nx.Graph()
        self.size: dict[Axis, int] = {}
        self.pins: dict[Axis, str] = {}
        self.products: list[tuple[Axis, list[Axis], str]] = []
        self.reads: list[tuple[Axis, fx.Node]] = []

    def shape(self, node: object) -> Sequence[int]:
        """Shape of a node's value, of the first one of a list; empty for what is no tensor."""
        if not isinstance(node, fx.Node):
            return ()
        value = get_tensor(self.module, str(node.target)) if node.op == "get_attr" else example_value(node)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        return value.shape if isinstance(value, Tensor) else ()

    def axes(self, node: Any) -> list[Axis]:
        """The axes of a node's value."""
        found = []
        for dim, size in enumerate(self.shape(node)):
            axis = Axis(str(node.target) if node.op == "get_attr" else node, dim)
            self.ties.add_node(axis)
            self.size.setdefault(axis, size)
            found.append(axis)
        return found

    def tie(self, *axes: Axis) -> None:
        """These have one order."""
        nx.add_path(self.ties, axes)

    def pin(self, axes: Sequence[Axis], why: str) -> None:
        """These cannot change their order."""
        for axis in axes:
            self.pins.setdefault(axis, why)

    def product(self, parent: Axis, children: Sequence[Axis], node: fx.Node) -> None:
        """The parent runs over the children."""
        # Axes of length 1 make no difference to a product; of one that is left, the parent is a mere copy.
        kept = [child for child in children if not known(self.size[child] == 1)]
        if len(kept) == 1:
            self.tie(parent, kept[0])
        elif kept:
            self.products.append((parent, kept, node.name))

    def finish(self) -> AxisGroups:
        """Number the groups."""
        # Groups and members in the order in which the graph met their axes, so that a run repeats.
        place = {axis: i for i, axis in enumerate(self.ties)}
        members = [sorted(component, key=place.__getitem__) for component in nx.connected_components(self.ties)]
        number = {axis: i for i, component in enumerate(members) for axis in component}
        sizes = []
        for component in members:
            fixed = [size for axis in component if isinstance(size := self.size.get(axis), int)]
            sizes.append(fixed[0] if fixed else None)
        # The first reason is the one that is told.
        pins: dict[int, str] = {}
        for axis, why in self.pins.items():
            pins.setdefault(number[axis], why)
        readers: dict[int, list[fx.Node]] = {}
        for axis, node in self.reads:
            readers.setdefault(number[axis], []).append(node)
        # One entry for each product, named by the first reshape that made it.
        products = {
            (number[parent], tuple(number[child] for child in children)): where
            for parent, children, where in reversed(self.products)
        }
        made = [Product(parent, children, where) for (parent, children), where in products.items()]
        return AxisGroups(members, sizes, pins, made, readers, number)
