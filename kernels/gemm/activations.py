"""The activations that may stand between a linear and the quantization of the next layer, one table for all of them.

The operators check names against it, the Triton kernels are compiled with its functions, and the rewrite that fuses
them looks for its calls. The native kernels have a C++ function of the same name (``native/linear.cpp``). A new one is
an entry here and a function there; :func:`add` takes one from outside this package, which then runs without the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.kernels import native
from fxq.kernels.jit import HAS_TRITON, Block, jit, tl


@jit
def _none(x: Block) -> Block:
    return x


@jit
def _gelu(x: Block) -> Block:
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@jit
def _gelu_tanh(x: Block) -> Block:
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@dataclass(frozen=True, eq=False)
class Activation:
    """One activation, elementwise.

    Attributes:
        name: what graphs and saved bundles call it.
        reference: of a float32 tensor, which it does not change; the result may be the tensor itself.
        triton: the same as a Triton function of a float32 block; None where there is none.
        calls: ATen overloads that compute it in a float graph, with the values that their other arguments then have.
        spills: architectures, as 90, on which its kernel spills with the largest tile, packed weights included.
    """

    name: str
    reference: Callable[[Tensor], Tensor]
    triton: object = None
    calls: Mapping[object, Mapping[str, object]] = field(default_factory=dict)
    spills: tuple[int, ...] = ()

    def eager_on(self, device: str) -> str:
        """Why torch computes it on a device type where the other activations are part of the kernel, or ""."""
        if device == "cpu" and native.ready() and native.activation_code(self.name) < 0:
            return f"the native kernels have no {self.name}: torch computes it"
        if device == "cuda" and HAS_TRITON and self.triton is None:
            return f"the Triton kernels have no {self.name}: torch computes it"
        return ""


ACTIVATIONS: dict[str, Activation] = {}
"""Name -> activation."""


def add(activation: Activation) -> Activation:
    """Make an activation known to the operators and to ``fxq.optimize``; processes that load its bundles do so too.

    Raises:
        ValueError: when its name is taken.
    """
    if activation.name in ACTIVATIONS:
        raise ValueError(f"there is an activation {activation.name!r} already: choose another name")
    ACTIVATIONS[activation.name] = activation
    return activation


_GELU = torch.ops.aten.gelu.default

add(Activation("none", lambda x: x, _none))
add(Activation("gelu", F.gelu, _gelu, {_GELU: {"approximate": "none"}}, spills=(120,)))
add(Activation("gelu_tanh", partial(F.gelu, approximate="tanh"), _gelu_tanh, {_GELU: {"approximate": "tanh"}}))
