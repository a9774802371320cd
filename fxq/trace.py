"""Capture with torch.export: one graph of ATen ops, compared with eager on the example."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxq.ir import QuantGraph, Stage, get_tensor, module_path

_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_REMEDIES = {  # by the higher-order operator whose body is a graph of its own
    "wrap_with_autocast": "cast the model with .to(dtype) and take torch.autocast out of its forward",
    "cond": "choose the branch outside the model, so that one call has one path",
}
_CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)


class TraceError(RuntimeError):
    """A model that cannot be captured, or whose graph does not compute what the model does."""


def trace(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    tolerance: float = 1e-4,
) -> QuantGraph:
    """Capture ``model`` at training IR (``aten.linear`` kept) without changing it.

    Args:
        model: a module, a GraphModule or an ExportedProgram (taken as it is).
        args: example positional inputs.
        kwargs: example keyword inputs.
        dynamic_shapes: as for ``torch.export.export``.
        tolerance: largest allowed ``max |graph - eager| / max |eager|`` on the example.

    Returns:
        A TRACED graph whose tensors share storage with the model's.

    Raises:
        TraceError: when export fails or the outputs differ; the message has the reason and the place.
    """
    kwargs = kwargs or {}
    if isinstance(model, ExportedProgram):
        program, eager = model, None
    else:
        eager = model
        try:
            with torch.no_grad():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TraceError(
                f"torch.export cannot capture {type(model).__name__}: {first}. Make the forward free of data-dependent "
                "Python branches and in-place cache writes, or pass an ExportedProgram"
            ) from error
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in _CHECKS:
            module.graph.erase_node(node)
    _inline_grad_modes(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    _refuse_regions(module)
    _compare(module, eager, args, kwargs, tolerance)
    return QuantGraph(module, Stage.TRACED).fork()


def _inline_grad_modes(module: fx.GraphModule) -> None:
    """Put the nodes of ``no_grad`` and ``enable_grad`` regions into the graph: inference has no gradients."""
    graph = module.graph
    while regions := [node for node in graph.nodes if node.target is _SET_GRAD]:
        for region in regions:
            _, source, *operands = region.args
            inner = getattr(module, str(source.target))
            values: dict[fx.Node, Any] = {}
            values.update(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
            with graph.inserting_before(region):
                for node in inner.graph.nodes:
                    if node.op in ("call_function", "get_attr"):
                        values[node] = graph.node_copy(node, values.__getitem__)
                        if node.op == "get_attr":
                            values[node].target = f"{source.target}.{node.target}"
                    elif node.op == "output":
                        results = fx.map_arg(node.args[0], values.__getitem__)
            for user in list(region.users):
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(region)


def _refuse_regions(module: fx.GraphModule) -> None:
    """Linears inside submodules of the graph would stay unseen, and nothing downstream could write them."""
    for node in module.graph.find_nodes(op="get_attr"):
        try:
            get_tensor(module, str(node.target))
        except TypeError as error:
            user = next(iter(node.users), node)
            name = str(user.target).rpartition(".")[2]
            place = f" in {path}" if (path := module_path(user)) else ""
            remedy = _REMEDIES.get(name, "keep it outside the model that is quantized")
            raise TraceError(
                f"the captured graph has a region {name} ({user.name}{place}): {remedy} ({error})"
            ) from None


def _compare(
    module: fx.GraphModule, eager: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: float
) -> None:
    mode = " The model is in training mode; call .eval() first." if eager is not None and eager.training else ""
    buffers = {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers()}
    with torch.no_grad():
        inputs, options = copy.deepcopy((args, kwargs))
        try:
            got = pytree.tree_leaves(module(*inputs, **options))
        except Exception as error:
            raise TraceError(f"the captured graph does not run on the example inputs: {error}") from error
        written = [n for n, (now, old) in buffers.items() if not torch.allclose(now, old, 0, 0, equal_nan=True)]
        for name in written:
            buffers[name][0].copy_(buffers[name][1])
        if written:
            raise TraceError(
                f"the forward writes to buffer {', '.join(written[:4])}: a call would change the model.{mode} "
                "Make caches inputs and outputs of the forward"
            )
        if eager is None:
            return
        inputs, options = copy.deepcopy((args, kwargs))
        want = pytree.tree_leaves(eager(*inputs, **options))
    if len(got) != len(want):
        raise TraceError(f"the captured graph returns {len(got)} values, the model {len(want)}")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.shape != b.shape:
            raise TraceError(f"output {i}: the captured graph returns shape {tuple(a.shape)}, eager {tuple(b.shape)}")
        if not a.numel():
            continue
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        scale = b.nan_to_num(0, 0, 0).abs().max().clamp_min(1e-12)
        error_ = (torch.where(same, 0.0, (a - b).abs()).max() / scale).item()
        if not error_ <= tolerance:
            raise TraceError(
                f"output {i}: the captured graph differs from eager by {error_:.2e} relative, allowed {tolerance:.0e}."
                f"{mode} Hidden state or randomness in forward is the usual cause"
            )
