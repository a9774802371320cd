"""What stands where a quantized layer's float weight was: its dtype, device and shape, and an error for its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxq.core.ir import LayerPlan


class IntegerLayer(Protocol):
    """A layer on integers, as far as the stand-ins of its float tensors know it."""

    in_features: int
    out_features: int
    has_bias: bool
    plan: LayerPlan

    @property
    def like(self) -> Tensor:
        """A tensor without elements that has dtype and device of the floats."""

    def compute(self, x: Tensor) -> Tensor:
        """The layer of ``x`` [..., in_features]: [..., out_features] in its dtype."""


_OPERATORS = tuple(
    f"__{name}__"
    for name in (
        *("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "matmul", "rmatmul", "imatmul"),
        *("truediv", "rtruediv", "itruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "ipow"),
        *("and", "rand", "or", "ror", "xor", "rxor", "neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"),
        *("bool", "float", "int", "index", "complex", "getitem", "setitem", "delitem", "iter", "contains", "array"),
    )
)
_OF_FORM = {  # attributes and methods that say what a tensor is, not what it holds
    *("dtype", "device", "layout", "itemsize", "element_size", "is_floating_point", "is_complex", "type", "get_device"),
    *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested", "is_mkldnn"),
    *("is_leaf", "grad", "grad_fn", "requires_grad", "is_inference"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
}
_LIKE: dict[object, Callable[..., Tensor]] = {
    torch.empty_like: torch.empty,
    torch.zeros_like: torch.zeros,
    torch.ones_like: torch.ones,
}


class ApplyError(ValueError):
    """A bundle that does not belong to the model it is applied to, or code that needs what the swap took away."""


class FloatStandIn:
    """``layer.weight`` or ``layer.bias`` of a :class:`~fxq.integrations.quantized_linear.QuantizedLinear`.

    It has the dtype, device and shape of the float tensor, so that code which casts or moves something to it works.
    ``torch.nn.functional.linear`` with the weight (and the bias) of one layer computes that layer. Everything else that
    would read or write values raises :class:`ApplyError` with the layer's name.

    Args:
        layer: the layer.
        name: "weight" or "bias".
    """

    __slots__ = ("_layer", "_name")
    _layer: IntegerLayer
    _name: str

    def __init__(self, layer: IntegerLayer, name: str) -> None:
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_name", name)

    @property
    def shape(self) -> torch.Size:
        """Shape of the float tensor."""
        layer = self._layer
        sizes = (layer.out_features, layer.in_features) if self._name == "weight" else (layer.out_features,)
        return torch.Size(sizes)

    def size(self, dim: int | None = None) -> int | torch.Size:
        """As ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of elements of the float tensor."""
        return self.shape.numel()

    nelement = numel

    @property
    def nbytes(self) -> int:
        """Bytes of the float tensor."""
        return self.numel() * self._layer.like.element_size()

    def stride(self, dim: int | None = None) -> int | tuple[int, ...]:
        """As ``Tensor.stride`` of a contiguous tensor."""
        strides = (self.shape[1], 1) if self._name == "weight" else (1,)
        return strides if dim is None else strides[dim]

    def is_contiguous(self, **options: object) -> bool:
        """True."""
        return True

    def requires_grad_(self, requires_grad: bool = True) -> FloatStandIn:
        """Itself; raises :class:`ApplyError` when a gradient is asked for: integers have none."""
        if requires_grad:
            raise self.refusal("requires_grad_")
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._layer, self._name)

    def __len__(self) -> int:
        return self.shape[0]

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"FloatStandIn({self._layer.plan.layer}.{self._name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if name in _OF_FORM:
            return getattr(self._layer.like.detach(), name)
        raise self.refusal(name)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "requires_grad" and not value:
            return
        raise self.refusal(f"setting {name}")

    def refusal(self, reader: str) -> ApplyError:
        """The error for code that needs values."""
        layer = self._layer.plan.layer
        return ApplyError(
            f"layer {layer} is quantized, its float {self._name} is gone: {reader} cannot read or change it. Call the "
            f"layer instead, or quantize again with a rule that keeps {layer} (scheme None)"
        )

    @classmethod
    def __torch_function__(
        cls, func: object, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        """``linear`` of one layer's weight and bias, casts of tensors to its form, and an error for the rest."""
        options = dict(kwargs or {})
        if func is torch.nn.functional.linear and (found := _linear(*args, **options)) is not None:
            layer, x = found
            return layer.compute(x)
        first = args[0] if args else None
        if func in (Tensor.to, Tensor.type_as) and isinstance(first, Tensor) and len(args) > 1:
            form, *rest = args[1:]
            if isinstance(form, cls):
                return first.to(form.device, form.dtype, *rest, **options)
        if func in _LIKE and isinstance(first, cls):
            form = {"dtype": first.dtype, "device": first.device} | options
            return _LIKE[func](tuple(first.shape), **form)
        leaves = pytree.tree_leaves((list(args), options))
        stand_in = next(leaf for leaf in leaves if isinstance(leaf, cls))
        raise stand_in.refusal(getattr(func, "__name__", str(func)))


def _linear(input: object, weight: object, bias: object = None) -> tuple[IntegerLayer, Tensor] | None:
    """The layer and its input, when the weight and the bias are those of one layer."""
    if not isinstance(weight, FloatStandIn) or weight._name != "weight" or not isinstance(input, Tensor):
        return None
    layer = weight._layer
    own = isinstance(bias, FloatStandIn) and bias._layer is layer and bias._name == "bias"
    return (layer, input) if own or (bias is None and not layer.has_bias) else None


def _refusing(name: str) -> Callable[..., object]:
    def refuse(self: FloatStandIn, *args: object, **options: object) -> object:
        raise self.refusal(name)

    return refuse


for _operator in _OPERATORS:
    setattr(FloatStandIn, _operator, _refusing(_operator))
