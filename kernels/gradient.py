"""Integers have no gradient, and no operator of this package has one: a backward pass that reaches one is an error.

Calls under autograd work. A float result of an input that requires a gradient belongs to the tape through a node that
raises; int8 results cannot, so they carry what they were made of to the operator that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKeySet
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fxq.kernels import guards

SOURCES = "_fxq_sources"
"""Attribute of int8 results: the tensors with a gradient that they were made of."""

NO_GRADIENT = "no_gradient(Tensor grad, SymInt[] size, ScalarType dtype, str operator) -> Tensor"
"""Schema of the operator that backward passes run into; an operator, so that compiled ones do as well."""


def refuse(grad: Tensor, size: Sequence[int], dtype: torch.dtype, operator: str) -> Tensor:
    """Raise RuntimeError that names the operator."""
    raise RuntimeError(
        f"{operator} has no gradient: it computes with integers or by a kernel without a backward. Call the quantized"
        " model under torch.no_grad() or torch.inference_mode(), or differentiate the float model in its place"
    )


def refuse_fake(grad: Tensor, size: Sequence[int], dtype: torch.dtype, operator: str) -> Tensor:
    """Shape and dtype of the gradient that there is not."""
    return grad.new_empty(size, dtype=dtype)


class _Node(torch.autograd.Function):
    """An operator on the tape. Inputs: the operator, the structure of its arguments, its flat arguments, sources."""

    @staticmethod
    def forward(definition: Callable[..., object], spec: pytree.TreeSpec, *flat: object) -> object:
        return definition(*pytree.tree_unflatten(flat[: spec.num_leaves], spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        definition, _, *flat = inputs
        ctx.operator = definition._schema.name
        ctx.forms = [(t.shape, t.dtype) if isinstance(t, Tensor) else None for t in flat]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> object:
        grad = next(g for g in grads if g is not None)
        results = [
            torch.ops.fxq.no_gradient(grad, form[0], form[1], ctx.operator) if needed else None
            for form, needed in zip(ctx.forms, ctx.needs_input_grad[2:], strict=True)
        ]
        return None, None, *results


def _carried(tensor: Tensor) -> Sequence[Tensor]:
    """What an int8 tensor, or the one that it is a view of, was made of."""
    sources = vars(tensor).get(SOURCES)
    if sources is None and (base := tensor._base) is not None:
        sources = vars(base).get(SOURCES)
    return sources or ()


def _sources(flat: Sequence[object]) -> list[Tensor]:
    """The tensors with a gradient that the arguments are or were made of."""
    tensors = [value for value in flat if isinstance(value, Tensor)]
    found = [tensor for tensor in tensors if tensor.requires_grad]
    carried = [source for tensor in tensors if tensor.dtype == torch.int8 for source in _carried(tensor)]
    return list({id(source): source for source in (*found, *carried)}.values())


def _attach(definition: Callable[..., object], arguments: Sequence[object]) -> object:
    """The operator's result as part of the tape; None where no argument has a gradient.

    Raises:
        RuntimeError: when an argument has a tangent of forward-mode differentiation.
    """
    flat, spec = pytree.tree_flatten(tuple(arguments))
    if forward_ad._current_level >= 0:
        floats = (value for value in flat if isinstance(value, Tensor) and value.is_floating_point())
        for tensor in floats:
            if forward_ad.unpack_dual(tensor).tangent is not None:
                refuse(tensor, tensor.shape, tensor.dtype, definition._schema.name)  # type: ignore[attr-defined]
    if not torch.is_grad_enabled():
        return None
    sources = _sources(flat)
    if not sources:
        return None
    known = {id(value) for value in flat}
    # torch.func has come down to one level here: its own way into autograd.Function would start at the top again.
    apply: Callable[..., object] = super(torch.autograd.Function, _Node).apply
    with enable_single_level_autograd_function():
        result = apply(definition, spec, *flat, *(s for s in sources if id(s) not in known))
    for tensor in pytree.tree_leaves(result):
        if tensor.dtype == torch.int8:
            # The base too: where a kernel gives a view, later views have its base and not the result.
            for owner in (tensor, tensor._base):
                if owner is not None:
                    vars(owner)[SOURCES] = sources
    return result


def autograd(definition: Callable[..., object]) -> Callable[..., object]:
    """What the dispatcher calls in place of the operator while tensors may have gradients."""

    def run(keys: DispatchKeySet, *arguments: object) -> object:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            result = _attach(definition, arguments)
            if result is not None:
                return result
        with torch._C._AutoDispatchBelowAutograd():
            return definition.redispatch(keys & guards.BELOW, *arguments)  # type: ignore[attr-defined]

    return run


def autograd_cpu(definition: Callable[..., object], kernel: Callable[..., object]) -> Callable[..., object]:
    """As :func:`autograd` on a CPU, where it costs next to nothing: plain tensors go to the kernel at once.

    Everything else, as tracing and tensor subclasses, goes on through the dispatcher.

    Args:
        definition: the operator.
        kernel: of the CPU, takes the dispatcher's keys before the arguments.
    """
    through_dispatcher = autograd(definition)

    def run(keys: DispatchKeySet, *arguments: object) -> object:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or not guards.plain(keys):
            result = through_dispatcher(keys, *arguments)
            guards.learn(keys)
            return result
        return kernel(keys, *arguments)

    return run
