"""Pickles of captured modules, for processes that are spawned: the graph as data, its tensors, facts and input values.

A pickle runs code when it is read. Bundles do not: they are the form for files.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.node import Target

from fxq.calls.captured import CapturedModule, guard_calls, inherit_notes, lasting_notes, rules_of
from fxq.calls.rules import CallRules
from fxq.core.ir import LayerPlan, get_tensor, plan_of, put_tensor, set_plan
from fxq.export.inputs import InputEntry, input_entries, record_values_later


@dataclasses.dataclass(frozen=True)
class _Ref:
    """An argument that is the result of another node."""

    node: str


@dataclasses.dataclass(frozen=True)
class _Operator:
    """An operator of torch by its name: the object itself cannot be pickled."""

    name: str

    def find(self) -> OpOverload:
        namespace, packet, overload = self.name.split(".")
        found: OpOverload = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        return found


@dataclasses.dataclass(frozen=True)
class _Node:
    name: str
    op: str
    target: _Operator | Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    plan: dict[str, object] | None


@dataclasses.dataclass(frozen=True)
class _State:
    """What a module is made from again. ``trained`` and ``attributes``: its mode and what users put on it."""

    title: str
    nodes: list[_Node]
    tensors: dict[str, Tensor]
    info: tuple[Any, ...]
    rules: CallRules | None
    notes: dict[str, object]
    inputs: tuple[InputEntry, ...] | None
    device: torch.device
    training: bool


def reduce_module(module: CapturedModule) -> tuple[object, ...]:
    """How a module is pickled, see :meth:`object.__reduce__`.

    Raises:
        TypeError: when forward hooks hang on it: they are code of the process that set them.
    """
    if any(getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks")):
        raise TypeError("this module has forward hooks, which cannot be pickled: remove them, or use fxq.save")
    graph = module.graph
    nodes = [
        _Node(
            node.name,
            node.op,
            _Operator(str(node.target)) if isinstance(node.target, OpOverload) else node.target,
            _plain(node.args),
            _plain(node.kwargs),
            None if (plan := plan_of(node)) is None else plan.to_json(),
        )
        for node in graph.nodes
    ]
    names = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr"))
    tensors = {name: get_tensor(module, name) for name in names}
    codegen = graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    info = codegen.pytree_info
    state = _State(
        type(module).__name__,
        nodes,
        tensors,
        (list(info.orig_args), info.in_spec, info.out_spec),
        rules_of(module),
        lasting_notes(module),
        input_entries(module),
        next((tensor.device for tensor in tensors.values()), torch.device("cpu")),
        module.training,
    )
    return restore_module, (state,)


def _plain(value: Any) -> Any:
    def plain(part: object) -> Any:
        return _Ref(part.name) if isinstance(part, fx.Node) else part

    return fx.node.map_aggregate(value, plain)


def restore_module(state: _State) -> CapturedModule:
    """The module that :func:`reduce_module` described."""
    graph, root, nodes = fx.Graph(), torch.nn.Module(), dict[str, fx.Node]()

    def link(part: object) -> Any:
        return nodes[part.node] if isinstance(part, _Ref) else part

    def linked(value: Any) -> Any:
        return fx.node.map_aggregate(value, link)

    for entry in state.nodes:
        target = entry.target.find() if isinstance(entry.target, _Operator) else entry.target
        node = graph.create_node(entry.op, target, linked(entry.args), linked(entry.kwargs), name=entry.name)
        if entry.plan is not None:
            set_plan(node, LayerPlan.from_json(entry.plan))
        nodes[entry.name] = node
    for name, tensor in state.tensors.items():
        put_tensor(root, name, tensor)
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(*state.info)))
    module = CapturedModule(root, graph, state.title)
    inherit_notes(module, state.notes)
    if state.rules is not None:
        module = guard_calls(module, state.rules)
    if state.inputs is not None:
        record_values_later(module, state.inputs, state.device)
    return module.train(state.training)


CapturedModule.reducer = reduce_module
