"""Capture with torch.export: one graph of ATen ops, compared with eager on the example."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxq.ir import QuantGraph, Stage

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
    module.graph.eliminate_dead_code()
    module.recompile()
    _compare(module, eager, args, kwargs, tolerance)
    return QuantGraph(module, Stage.TRACED).fork()


def _compare(
    module: fx.GraphModule, eager: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: float
) -> None:
    with torch.no_grad():
        try:
            got = pytree.tree_leaves(module(*args, **kwargs))
        except Exception as error:
            raise TraceError(f"the captured graph does not run on the example inputs: {error}") from error
        if eager is None:
            return
        inputs, options = copy.deepcopy((args, kwargs))
        training = eager.training
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
        scale = b.double().abs().max().clamp_min(1e-12)
        error_ = ((a.double() - b.double()).abs().max() / scale).item()
        if not error_ <= tolerance:
            mode = " The model is in training mode; call .eval() first." if training else ""
            raise TraceError(
                f"output {i}: the captured graph differs from eager by {error_:.2e} relative, allowed {tolerance:.0e}."
                f"{mode} Hidden state or randomness in forward is the usual cause"
            )
