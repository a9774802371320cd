"""How a pass changes what a graph is called with: inputs with sizes that vary, and the signature that follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from fxq.calls.captured import convention, rules_of, set_convention
from fxq.calls.conditions import Expression
from fxq.core.facts import Facts
from fxq.core.ir import QuantGraph, inherit_meta, module_note
from fxq.core.signature import call_rules
from fxq.passes.match.patterns import Unfit

Size = int | torch.SymInt


class Maker:
    """Makes inputs whose sizes vary as those of an input that is there."""

    def __init__(self, like: Tensor) -> None:
        if not isinstance(like, FakeTensor):
            raise Unfit("the graph has no recorded values: save and load it with this version, or capture it again")
        self.mode, self.device = like.fake_mode, like.device
        self.env: ShapeEnv = self.mode.shape_env or ShapeEnv()

    def size(self, name: str, hint: int) -> torch.SymInt:
        """A size that may vary; ``hint`` is its example."""
        from torch._dynamo.source import ConstantSource  # Dynamo takes a second to import

        source = ConstantSource(f"__{name}")
        symbol = self.env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        size = self.env.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        return size

    def input(self, before: fx.Node, name: str, shape: tuple[Size, ...], dtype: torch.dtype) -> fx.Node:
        """A new input in front of a node."""
        with self.mode:
            value = torch.empty(shape, dtype=dtype, device=self.device)
        with before.graph.inserting_before(before):
            node = before.graph.placeholder(name)
        inherit_meta(node, before, value)
        return node


@dataclasses.dataclass(frozen=True)
class Part:
    """What stands for an input that goes: nested ``nodes``, and how long it was in terms of new inputs.

    Its second size was the sum of those of ``lengths``, (input, axis) each; the others are those of the first of them.
    """

    nodes: object
    lengths: Sequence[tuple[fx.Node, int]]


def set_inputs(graph: QuantGraph, replaced: Mapping[fx.Node, Part], more: Mapping[str, object]) -> None:
    """Erase the inputs that were replaced, and say how the graph is called now: rules, facts, calling convention.

    Args:
        graph: with the new inputs in their places: parts where the old input was, in the order of their nesting, and
            ``more`` behind all others.
        replaced: old inputs, which nothing reads.
        more: arguments beside those that there were, by name.

    Raises:
        Unfit: when something still reads an old input.
    """
    module = graph.module
    new = set(pytree.tree_leaves([[part.nodes for part in replaced.values()], dict(more)]))
    old = [node for node in module.graph.find_nodes(op="placeholder") if node not in new]
    for node in replaced:
        if node.users:
            raise Unfit(f"{node.name} is also read by {next(iter(node.users)).name}")
    names, spec = convention(module)
    leaves = [replaced[node].nodes if node in replaced else node for node in old]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    if kwargs:
        kwargs |= dict(more)
    else:
        args = (*args, *more.values())
    for node in replaced:
        module.graph.erase_node(node)
    inputs = module.graph.find_nodes(op="placeholder")
    assert inputs == pytree.tree_leaves((args, kwargs)), "new inputs stand in another order than their nesting"
    place = {node: number for number, node in enumerate(inputs)}
    before = rules_of(module)
    moved = [_moved(condition, old, place, replaced) for condition in (before.conditions if before else ())]
    rules = call_rules(module, moved)
    set_convention(module, [*names, *more], pytree.tree_structure((args, kwargs)), rules)
    if isinstance(facts := module_note(module), Facts):
        now = dataclasses.replace(facts, inputs=rules.sizes, dtypes=rules.dtypes, conditions=rules.conditions)
        now.attach(module)


def _moved(
    condition: Expression, old: list[fx.Node], place: Mapping[fx.Node, int], replaced: Mapping[fx.Node, Part]
) -> Expression:
    """A condition on the old inputs, said of the new ones."""
    if not isinstance(condition, list):
        return condition
    name, *operands = condition
    if name not in ("size", "value"):
        return [name, *(_moved(operand, old, place, replaced) for operand in operands)]
    number, *axes = operands
    assert isinstance(number, int), "conditions were checked when they were made"
    node = old[number]
    if node not in replaced:
        return [name, place[node], *axes]
    lengths = replaced[node].lengths
    if axes != [1]:
        return ["size", place[lengths[0][0]], *axes]
    sizes: list[Expression] = [["size", place[part], axis] for part, axis in lengths]
    total = sizes[0]
    for size in sizes[1:]:
        total = ["+", total, size]
    return total
