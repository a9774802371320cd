"""Triton, when it is installed.

Kernels import ``tl`` and ``jit`` from here, so that the library imports and runs on a CPU without Triton, and so that
the one untyped dependency of the kernels is touched in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

triton: Any = None
tl: Any = None
with suppress(ImportError):
    triton, tl = import_module("triton"), import_module("triton.language")

HAS_TRITON = triton is not None and torch.version.hip is None
"""Whether the kernels are bound on "cuda". They are written and checked for NVIDIA's compiler only."""

if TYPE_CHECKING or triton is None:
    Pointer: TypeAlias = Any
    Scalar: TypeAlias = Any
    Block: TypeAlias = Any
    constexpr: TypeAlias = Any
else:  # the compiler resolves the annotations of a kernel and accepts Triton's own names only
    Pointer = Scalar = Block = tl.tensor
    constexpr = tl.constexpr


def constant(value: float | str) -> Any:
    """A number or a text that kernels may read as a global."""
    return value if triton is None else tl.constexpr(value)


def jit(kernel: Callable[..., object]) -> Any:
    """``triton.jit``, or the function itself where Triton is missing: it is then never launched."""
    return kernel if triton is None else triton.jit(kernel)
