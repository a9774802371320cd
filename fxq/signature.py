"""How a captured graph is called: its flat inputs, their sizes, and the check that a call fits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._pytree import tree_flatten_spec
from torch.utils import _pytree as pytree

from fxq.ir import example_value

Sizes = list[list[int | None] | dict[str, Any] | None]
"""Per flat input its shape with None for dynamic dimensions, ``{"value": v}`` for a constant, or None for anything."""


class InputError(ValueError):
    """A call whose arguments do not fit the captured graph."""


def flatten_call(module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """Arguments as the flat list of the graph's placeholders, nested dicts in the example's order.

    Raises:
        InputError: when names, number or nesting differ from the example the graph was captured with.
    """
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    names = [name for name in info.orig_args if name != "self"]
    missing = [name for name in names[len(args) :] if name not in kwargs]
    unknown = [name for name in kwargs if name not in names[len(args) :]]
    if missing or unknown or len(args) > len(names):
        raise InputError(
            f"arguments do not fit the captured call {tuple(names)}: {len(args)} positional, missing {missing}, "
            f"unknown {unknown}; every call must use the arguments of the example"
        )
    values = [*args, *(kwargs[name] for name in names[len(args) :])]
    positional = info.in_spec.child(0).num_children
    call = (tuple(values[:positional]), dict(zip(names[positional:], values[positional:], strict=True)))
    leaves, spec = pytree.tree_flatten(call)
    if spec == info.in_spec:
        return leaves
    try:
        ordered: list[Any] = tree_flatten_spec(call, info.in_spec)
    except (LookupError, TypeError, ValueError):
        ordered = []
    if len(ordered) != len(leaves):
        raise InputError(f"arguments are nested in another way than the example: {spec}, expected {info.in_spec}")
    return ordered


def input_sizes(module: fx.GraphModule) -> Sizes:
    """Sizes of the graph's inputs, from the values recorded when it was traced."""
    sizes: Sizes = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = example_value(node)
        if isinstance(value, Tensor):
            sizes.append([_fixed(size) for size in value.shape])
        else:
            constant = value is None or isinstance(value, bool | int | float | str)
            sizes.append({"value": value} if constant else None)
    return sizes


def _fixed(size: int | torch.SymInt) -> int | None:
    """The size, or None where it may vary; a dimension left to export is a symbol with a value once it is fixed."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def check_sizes(module: fx.GraphModule, sizes: Sizes, leaves: Sequence[Any]) -> None:
    """Compare flat inputs with the sizes and constants of the captured graph.

    Raises:
        InputError: naming the input, what it is and what the graph was captured for.
    """
    for node, want, value in zip(module.graph.find_nodes(op="placeholder"), sizes, leaves, strict=True):
        if isinstance(want, dict):
            if isinstance(value, Tensor) or type(value) is not type(want["value"]) or value != want["value"]:
                shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise InputError(
                    f"input {node.name} is {shown}, the graph was captured for {want['value']!r}: what is not a tensor "
                    "is a constant of the graph; quantize once for each value that calls use"
                )
        elif want is not None:
            _check_shape(node.name, want, value)


def _check_shape(name: str, want: list[int | None], value: Any) -> None:
    shown = ", ".join("any" if w is None else str(w) for w in want)
    if not isinstance(value, Tensor):
        raise InputError(f"input {name} is {value!r}, the graph was captured for a tensor of shape [{shown}]")
    if value.ndim != len(want) or any(w is not None and w != s for w, s in zip(want, value.shape, strict=True)):
        raise InputError(
            f"input {name} has shape {list(value.shape)}, the graph was captured for [{shown}]; "
            "capture it with dynamic_shapes that allow this size"
        )


def guard_inputs(module: fx.GraphModule, sizes: Sizes) -> fx.GraphModule:
    """Make ``module`` refuse calls of other sizes than it was captured for: a graph would compute nonsense silently.

    Raises:
        ValueError: when ``sizes`` does not describe the graph's inputs.
    """
    inputs = module.graph.find_nodes(op="placeholder")
    if not isinstance(sizes, list) or len(sizes) != len(inputs):
        raise ValueError(f"the facts describe {sizes!r} as inputs, the graph has {len(inputs)}")

    def before(called: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(called, fx.GraphModule)
        check_sizes(called, sizes, flatten_call(called, args, kwargs))

    module.register_forward_pre_hook(before, with_kwargs=True)
    return module


def batch_dynamic(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``dynamic_shapes`` that let the first dimension of every tensor vary where the model allows it.

    None, everything static, for a call that mixes positional and keyword arguments: their order in the model's
    signature is not known here.
    """

    def first(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.ndim else None

    if args and kwargs:
        return None
    return pytree.tree_map(first, dict(kwargs)) if kwargs else pytree.tree_map(first, tuple(args))
