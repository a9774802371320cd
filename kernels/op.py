"""Operators of the ``fxq`` namespace: declared once, bound per device.

A declaration is a schema, the shape rule ("fake"), sample arguments, the argument check, and the reference as the
decorated function. The reference runs on any device; :meth:`Op.on` binds a faster kernel for one of them::

    @declare("double(Tensor x) -> Tensor", fake=..., samples=..., supports=...)
    def double(x: Tensor) -> Tensor:
        return x * 2

    @double.on("cuda", "triton")
    def launch(x: Tensor) -> Tensor: ...

The graph holds ``double.definition`` and the dispatcher picks the kernel. Operators are defined through
``torch.library.Library``: a call costs a third of one through ``torch.library.custom_op``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import Library, register_fake

from fxq.kernels import gradient, guards

NAMESPACE = "fxq"

Arguments = tuple[Any, ...]
Kernel = TypeVar("Kernel", bound=Callable[..., Tensor])


@dataclass
class _Registry:
    """The library and what was registered in it; operators vanish when the library is garbage-collected."""

    library: Library
    done: set[tuple[str, str]] = field(default_factory=set)


def _process_registry() -> _Registry:
    """The registry of this process: a second load of this module finds the first one and registers nothing twice."""
    namespace = getattr(torch.ops, NAMESPACE)
    if "declared" not in vars(namespace):
        namespace.declared = _Registry(Library(NAMESPACE, "DEF"))
    registry: _Registry = namespace.declared
    return registry


_REGISTRY = _process_registry()


@dataclass(frozen=True, eq=False)
class Op:
    """One operator.

    Attributes:
        name: name inside the ``fxq`` namespace.
        schema: the declared schema.
        definition: the overload that graphs hold.
        reference: the decorated function, for any device.
        samples: builds argument tuples on the CPU; tests run every kernel on them.
        supports: takes the operator's arguments; the reason why they are not supported, or "".
        max_error: largest difference a kernel may show from the reference, relative to the largest reference value.
        implementations: device type -> name of the kernel bound to it, or a function that says it.
    """

    name: str
    schema: str
    definition: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    samples: Callable[[], Sequence[Arguments]]
    supports: Callable[..., str]
    max_error: float
    implementations: dict[str, str | Callable[[], str]] = field(default_factory=dict)

    def __call__(self, *args: object) -> Tensor:
        """Call through the dispatcher.

        Raises:
            ValueError: with the reason from ``supports``, or when tensors lie on different devices or are not dense.
        """
        return self.definition(*args)

    def on(self, device: str, implementation: str | Callable[[], str]) -> Callable[[Kernel], Kernel]:
        """Bind the decorated function as this operator's kernel on a device type such as "cpu" or "cuda"."""

        def bind(kernel: Kernel) -> Kernel:
            key, checked = device.upper(), guards.checked_by_keys(self.name, self.supports, kernel)
            _register(self.name, key, checked, with_keyset=True)
            if device == "cpu":
                _register(self.name, "AutogradCPU", gradient.autograd_cpu(self.definition, checked), with_keyset=True)
            self.implementations[device] = implementation
            return kernel

        return bind

    def used(self, device: str) -> str:
        """Name of the implementation that runs on a device type; "reference" where nothing faster is bound."""
        name = self.implementations.get(device, "reference")
        return name if isinstance(name, str) else name()


def declare(
    schema: str,
    *,
    fake: Callable[..., Tensor],
    samples: Callable[[], Sequence[Arguments]],
    supports: Callable[..., str],
    max_error: float = 0.0,
) -> Callable[[Callable[..., Tensor]], Op]:
    """Declare an operator; the decorated function is its reference and runs on every device without a kernel.

    Args:
        schema: ``name(arguments) -> Tensor`` in the dispatcher's language.
        fake: shape, dtype and strides of the result for the same arguments.
        samples: see :class:`Op`.
        supports: see :class:`Op`; asked before every call, so it compares shapes and dtypes only, never values.
        max_error: see :class:`Op`.
    """
    name = schema.split("(", 1)[0]

    def bind(reference: Callable[..., Tensor]) -> Op:
        if (name, "schema") not in _REGISTRY.done:
            _REGISTRY.library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            register_fake(f"{NAMESPACE}::{name}", guards.checked(name, supports, fake), lib=_REGISTRY.library)
            _REGISTRY.done.add((name, "schema"))
        _register(name, "CompositeExplicitAutograd", guards.checked(name, supports, reference))
        definition = getattr(getattr(torch.ops, NAMESPACE), name).default
        _register(name, "Autograd", gradient.autograd(definition), with_keyset=True)
        return Op(name, schema, definition, reference, samples, supports, max_error)

    return bind


def _register(name: str, key: str, kernel: Callable[..., Any], with_keyset: bool = False) -> None:
    if (name, key) not in _REGISTRY.done:
        _REGISTRY.library.impl(name, kernel, key, with_keyset=with_keyset)
        _REGISTRY.done.add((name, key))


def _declare_no_gradient() -> None:
    """Define what backward passes run into."""
    name = gradient.NO_GRADIENT.split("(", 1)[0]
    if (name, "schema") not in _REGISTRY.done:
        _REGISTRY.library.define(gradient.NO_GRADIENT, tags=(torch.Tag.pt2_compliant_tag,))
        register_fake(f"{NAMESPACE}::{name}", gradient.refuse_fake, lib=_REGISTRY.library)
        _REGISTRY.done.add((name, "schema"))
    _register(name, "CompositeExplicitAutograd", gradient.refuse)


_declare_no_gradient()
