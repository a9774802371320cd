"""What every call of an operator passes before its kernel: dense tensors on one device, and ``supports``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKeySet

BELOW = torch._C._after_ADInplaceOrView_keyset
"""Dispatch keys under those of autograd."""

CPU = torch._C.DispatchKey.CPU

A = TypeVar("A")

_PLAIN: set[int] = set()
"""Key sets of calls whose tensors were all dense and on the CPU. Any other tensor adds a key of its own."""


def checked(
    name: str, take: Callable[[tuple[object, ...]], A], supports: Callable[[A], str], kernel: Callable[[A], object]
) -> Callable[..., object]:
    """The kernel of ``fxq::name`` behind the checks; ValueError with what is wrong.

    Args:
        name: of the operator.
        take: the object that ``supports`` and the kernel take, of the dispatcher's flat arguments.
        supports: the reason why arguments are not supported, or "".
        kernel: what runs them.
    """

    @wraps(kernel)
    def run(*arguments: object) -> object:
        if reason := misplaced(name, arguments):
            raise ValueError(f"fxq::{name}: {reason}")
        taken = take(arguments)
        if reason := supports(taken):
            raise ValueError(f"fxq::{name}: {reason}")
        return kernel(taken)

    return run


def checked_by_keys(
    name: str, take: Callable[[tuple[object, ...]], A], supports: Callable[[A], str], kernel: Callable[[A], object]
) -> Callable[..., object]:
    """As :func:`checked` with the dispatcher's keys before the arguments: they tell the usual call apart at once."""

    @wraps(kernel)
    def run(keys: DispatchKeySet, *arguments: object) -> object:
        if keys.raw_repr() not in _PLAIN:
            if reason := misplaced(name, arguments):
                raise ValueError(f"fxq::{name}: {reason}")
            if (keys & BELOW).highestPriorityTypeId() == CPU:
                _PLAIN.add(keys.raw_repr())
        taken = take(arguments)
        if reason := supports(taken):
            raise ValueError(f"fxq::{name}: {reason}")
        return kernel(taken)

    return run


def plain(keys: DispatchKeySet) -> bool:
    """Whether the keys are those of a call with nothing but dense CPU tensors that has been seen before."""
    return keys.raw_repr() in _PLAIN


def learn(keys: DispatchKeySet) -> None:
    """Keys count as plain once those that are left under autograd do."""
    if plain(keys & BELOW):
        _PLAIN.add(keys.raw_repr())


def misplaced(name: str, arguments: Sequence[object]) -> str:
    """Why the tensors among an operator's arguments are not dense and on one device, or ""."""
    first: Tensor | None = None
    for i, value in enumerate(arguments):
        for tensor in (value,) if isinstance(value, Tensor) else value if isinstance(value, list | tuple) else ():
            first = tensor if first is None else first
            if tensor.device == first.device and tensor.layout is torch.strided and not tensor.is_nested:
                continue
            argument = getattr(torch.ops.fxq, name).default._schema.arguments[i].name
            if tensor.device != first.device:
                return f"{argument} is on {tensor.device}, the arguments before it on {first.device}: move it there"
            form = "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
            return f"{argument} is {form}: expected a dense one, as of to_dense() or to_padded_tensor()"
    return ""
