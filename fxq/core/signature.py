"""How a captured graph is called: its flat inputs, and what they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxq.calls.captured import CapturedModule, convention, guard_calls, rules_of
from fxq.calls.conditions import Expression
from fxq.calls.rules import CallRules, InputError, Sizes, bind, constant_entry, flatten
from fxq.core.facts import Facts
from fxq.core.ir import example_value
from fxq.dtypes import dtype_name

__all__ = ["InputError", "Sizes", "call_rules", "flatten_call", "guard_inputs", "input_sizes", "rules_of"]


def flatten_call(module: fx.GraphModule, args: Sequence[object], kwargs: Mapping[str, object]) -> Sequence[object]:
    """Arguments as the flat list of the graph's placeholders, nested dicts in the example's order.

    Raises:
        InputError: when names, number or nesting differ from the example the graph was captured with.
    """
    names, spec = convention(module)
    return flatten(*bind(names, spec, args, kwargs), spec)


def hint_of(size: int | torch.SymInt) -> int:
    """The number a size had when the graph was captured.

    Raises:
        ValueError: when the size depends on data.
    """
    if isinstance(size, int):
        return size
    if not size.node.has_hint():
        raise ValueError(f"size {size} depends on data")
    return int(size.node.hint)


def input_sizes(module: fx.GraphModule) -> Sizes:
    """Sizes of the graph's inputs, from the values recorded when it was traced."""
    sizes: Sizes = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = example_value(node)
        if isinstance(value, Tensor):
            sizes.append([_fixed(size) for size in value.shape])
        else:
            sizes.append(constant_entry(value))
    return sizes


def _fixed(size: int | torch.SymInt) -> int | None:
    """The size, or None where it may vary; a dimension left to export is a symbol with a value once it is fixed."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def call_rules(module: fx.GraphModule, conditions: Sequence[Expression] = ()) -> CallRules:
    """What a graph with recorded values may be called with.

    Args:
        module: the graph.
        conditions: see :mod:`fxq.calls.conditions`.
    """
    nodes = module.graph.find_nodes(op="placeholder")
    values = [example_value(node) for node in nodes]
    dtypes = [dtype_name(value.dtype) if isinstance(value, Tensor) else None for value in values]
    return CallRules(tuple(n.name for n in nodes), input_sizes(module), tuple(dtypes), tuple(conditions))


def guard_inputs(module: fx.GraphModule) -> CapturedModule:
    """Make ``module`` refuse other calls than it was captured for: a graph would compute nonsense silently.

    Args:
        module: the graph, with its facts.

    Returns:
        The module, or one that shares its graph and tensors where it was a plain GraphModule.

    Raises:
        ValueError: when it has no facts, or they do not describe the graph's inputs.
    """
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    return guard_calls(module, Facts.of(module).call_rules(names))


def batch_dynamic(args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """``dynamic_shapes`` that let the first dimension of every tensor vary where the model allows it.

    None, everything static, for a call that mixes positional and keyword arguments: their order in the model's
    signature is not known here.
    """

    def first(value: object) -> object:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.ndim else None

    if args and kwargs:
        return None
    return pytree.tree_map(first, dict(kwargs)) if kwargs else pytree.tree_map(first, tuple(args))
