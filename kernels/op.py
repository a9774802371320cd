"""Operators of the ``fxq`` namespace: declared once, bound per device.

A declaration is a class of arguments, the shape rule ("fake"), sample arguments, the argument check, and the reference
as the decorated function. The schema follows from the class; everything else takes one object of it. The reference runs
on any device; :meth:`Operator.on` binds a faster kernel for one of them::

    class Double(NamedTuple):
        x: Tensor

    @declare(Double, fake=lambda a: torch.empty_like(a.x), samples=..., supports=...)
    def double(a: Double) -> Tensor:
        return a.x * 2

    @double.on("cuda", "triton")
    def launch(a: Double) -> Tensor: ...

``double(x)`` calls it, and the graph holds ``double.definition``: the dispatcher knows the flat arguments alone and
picks the kernel. Operators are defined through ``torch.library.Library``: a call costs a third of one through
``torch.library.custom_op``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch.library import Library, register_fake

from fxq.kernels import gradient, guards
from fxq.kernels.opaque import opaque
from fxq.kernels.schema import fields, flatten, schema_of, taker

NAMESPACE = "fxq"

Arguments = tuple[object, ...]
A = TypeVar("A", bound=Arguments)
R = TypeVar("R")


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
class Operator(Generic[A, R]):
    """One operator that takes an ``A`` and returns an ``R``.

    Attributes:
        name: name inside the ``fxq`` namespace.
        schema: the schema that graphs and saved bundles call it by.
        definition: the overload that graphs hold.
        kind: the class of its arguments.
        take: an object of it, of the flat arguments.
        compute: the decorated function, the reference for any device.
        unfit: the reason why arguments are not supported, or "".
        examples: arguments on the CPU; tests run every kernel on them.
        max_error: largest difference a kernel may show from the reference, relative to the largest reference value.
        implementations: device type -> name of the kernel bound to it, or a function that says it.
    """

    name: str
    schema: str
    definition: Callable[..., R]
    kind: type[A]
    take: Callable[[Arguments], A]
    compute: Callable[[A], R]
    unfit: Callable[[A], str]
    examples: Callable[[], Sequence[A]]
    max_error: float
    implementations: dict[str, str | Callable[[], str]] = field(default_factory=dict)

    def __call__(self, *arguments: object) -> R:
        """Call through the dispatcher.

        Raises:
            ValueError: with the reason from ``supports``, or when tensors lie on different devices or are not dense.
        """
        return self.definition(*arguments)

    def reference(self, *arguments: object) -> R:
        """The result of the reference, without checks and without the dispatcher."""
        return self.compute(self._taken(arguments))

    def supports(self, *arguments: object) -> str:
        """The reason why the arguments are not supported, or ""."""
        return self.unfit(self._taken(arguments))

    def _taken(self, arguments: Arguments) -> A:
        expected = len(list(fields(self.kind)))
        if len(arguments) != expected:
            raise TypeError(f"fxq::{self.name} takes {expected} arguments, not {len(arguments)}: {self.schema}")
        return self.take(arguments)

    def samples(self) -> list[Arguments]:
        """Flat sample arguments on the CPU."""
        return [flatten(arguments) for arguments in self.examples()]

    def on(
        self, device: str, implementation: str | Callable[[], str]
    ) -> Callable[[Callable[[A], R]], Callable[[A], R]]:
        """Bind the decorated function as this operator's kernel on a device type such as "cpu" or "cuda"."""

        def bind(kernel: Callable[[A], R]) -> Callable[[A], R]:
            key, checked = device.upper(), guards.checked_by_keys(self.name, self.take, self.unfit, kernel)
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


Op: TypeAlias = Operator[Any, Any]
"""Any operator."""


def declare(
    kind: type[A],
    *,
    fake: Callable[[A], R],
    samples: Callable[[], Sequence[A]],
    supports: Callable[[A], str],
    max_error: float = 0.0,
    results: Sequence[str] = (),
) -> Callable[[Callable[[A], R]], Operator[A, R]]:
    """Declare an operator; the decorated function is its reference and runs on every device without a kernel.

    The operator has the function's name, and the fields of ``kind`` for arguments.

    Args:
        kind: a NamedTuple of tensors, tensors or None, sequences of tensors, int, float, str and dtypes, or of other
            such classes, whose fields then stand in their place.
        fake: shape, dtype and strides of the result for the same arguments.
        samples: builds arguments on the CPU; tests run every kernel on them.
        supports: the reason why arguments are not supported, or "". Asked before every call, so it compares shapes and
            dtypes only, never values.
        max_error: see :class:`Operator`.
        results: names of the tensors of a result that is a tuple.

    Raises:
        TypeError: when a field has a type that the dispatcher does not know.
    """

    def bind(reference: Callable[[A], R]) -> Operator[A, R]:
        name = reference.__name__
        schema, take = schema_of(name, kind, results), taker(kind)
        if (name, "schema") not in _REGISTRY.done:
            _REGISTRY.library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            register_fake(f"{NAMESPACE}::{name}", guards.checked(name, take, supports, fake), lib=_REGISTRY.library)
            _REGISTRY.done.add((name, "schema"))
        _register(name, "CompositeExplicitAutograd", guards.checked(name, take, supports, reference))
        definition = getattr(getattr(torch.ops, NAMESPACE), name).default
        _register(name, "Autograd", gradient.autograd(definition), with_keyset=True)
        return Operator(name, schema, definition, kind, take, reference, supports, samples, max_error)

    return bind


def _register(name: str, key: str, kernel: Callable[..., object], with_keyset: bool = False) -> None:
    if (name, key) not in _REGISTRY.done:
        _REGISTRY.library.impl(name, opaque(kernel), key, with_keyset=with_keyset)
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
