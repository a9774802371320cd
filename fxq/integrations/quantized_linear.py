"""The linear on integers or float8 that takes the place of an ``nn.Linear``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from fxq import numerics
from fxq.core.ir import LAYER_TENSORS, LayerPlan
from fxq.core.layer import Operators
from fxq.core.method import Scheme
from fxq.integrations.stand_in import FloatStandIn
from fxq.kernels import native
from fxq.kernels.gemm.panels import pack_panels
from fxq.metrics.deviation import deviation_in_steps
from fxq.passes.methods.grid import group_steps

_GONE = ("weight", "bias")
_OWN = {name: "integers" if name == "weight" else name for name in LAYER_TENSORS}  # stored name -> buffer


def buffer_name(stored: str) -> str:
    """The buffer of a :class:`QuantizedLinear` that holds what is stored under a name."""
    return _OWN.get(stored, stored)


class QuantizedLinear(nn.Module):
    """A linear on integers: quantization of the input, static or per token, integer product, one or two scales.

    Its buffers are the tensors of the bundle's layer (docs/bundle.md) under the same names, but that the bundle's
    ``weight`` is ``integers``: ``weight`` and ``bias`` are a :class:`~fxq.integrations.stand_in.FloatStandIn` with the
    form of the float tensors. ``half()`` and ``to(dtype)`` change that form only; ``to(device)`` moves everything. A
    state dict with the bundle's names loads too. ``like`` is a parameter without elements that holds dtype and device
    of the floats, for code that asks the first parameter of a module; a state dict may lack it. On a CPU with native
    kernels ``panels`` holds the integers once more, in their layout; it is not saved. Float8 layers have none, and no
    ``input_zero_point``.

    Args:
        plan: of the layer.
        split: number of normal input channels.
        input_bits: bits of the activations.
        weight_bits: bits of the stored weight; 4 is packed.
        tensors: the layer's tensors by name, those of :func:`~fxq.core.ir.stored_names`.
        dtype: of the float weight.
        has_bias: whether the float linear has a bias; ``bias`` is None else.
    """

    like: nn.Parameter
    integers: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    offset: Tensor
    perm: Tensor | None

    def __init__(
        self,
        plan: LayerPlan,
        split: int,
        input_bits: int,
        weight_bits: int,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        has_bias: bool = True,
    ) -> None:
        super().__init__()
        self.plan, self.split, self.input_bits, self.weight_bits = plan, split, input_bits, weight_bits
        self.in_features, self.out_features, self.has_bias = plan.in_features, plan.out_features, has_bias
        for name in LAYER_TENSORS:
            self.register_buffer(_OWN[name], tensors.get(name))
        self.set_form(dtype)
        self.lay_out()

    @property
    def weight(self) -> FloatStandIn:
        """The form of the float weight [N, K]."""
        return FloatStandIn(self, "weight")

    @property
    def bias(self) -> FloatStandIn | None:
        """The form of the float bias [N], or None."""
        return FloatStandIn(self, "bias") if self.has_bias else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _GONE:
            raise FloatStandIn(self, name).refusal(f"setting {name}")
        super().__setattr__(name, value)

    @property
    def panels(self) -> Tensor | None:
        """The integers in the layout of the native kernels, or None, and then no buffer: tools expect values in one."""
        return self._buffers.get("panels")

    def set_form(self, dtype: torch.dtype) -> None:
        """Let ``weight`` have this dtype and the device of the integers."""
        self.like = nn.Parameter(torch.empty(0, dtype=dtype, device=self.integers.device), requires_grad=False)

    def take_over(self, linear: nn.Linear) -> None:
        """Turn a float linear into this layer: it keeps its identity, hooks, other attributes and mode.

        Its weight and bias are dropped; tensors are shared with ``self``.
        """
        for name in _GONE:
            linear._parameters.pop(name, None)
        own = {name: value for name, value in vars(self).items() if name not in vars(linear)}
        linear.__class__ = type(self)  # type: ignore[assignment]
        for table in ("_parameters", "_buffers"):
            linear.__dict__[table].update(vars(self)[table])
        linear._non_persistent_buffers_set |= self._non_persistent_buffers_set
        linear.__dict__.update(own)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` float [..., in_features]; returns [..., out_features] in its dtype; float64 is computed in float32."""
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """As :meth:`forward`, whatever an instance has in its place."""
        if x.dtype == torch.float64:
            return self.compute(x.float()).double()
        operators = self.operators
        made = operators.quantize.definition(x, *self.quantization())
        made = made if self.per_token else (made,)
        result: Tensor = operators.product.definition(*made, *self.product(), x.dtype)
        return result

    @property
    def per_token(self) -> bool:
        """Whether the scales of the input are measured per token."""
        return self.input_scale is None

    @property
    def asymmetric(self) -> bool:
        """Whether zero points are measured with the scales."""
        return self.plan.scheme is not None and self.plan.scheme.asymmetric

    @property
    def is_float8(self) -> bool:
        """Whether weights and inputs are float8."""
        return self.plan.scheme is not None and self.plan.scheme.is_float8

    @property
    def operators(self) -> Operators:
        """Those that quantize the input and multiply."""
        scheme = Scheme() if self.plan.scheme is None else self.plan.scheme
        return Operators.of(dataclasses.replace(scheme, per_token=self.per_token))

    def quantization(self) -> tuple[object, ...]:
        """Arguments of the operator that quantizes, after the input."""
        scales = (self.input_scale, *(() if self.is_float8 else (self.input_zero_point,)))
        bits = () if self.is_float8 else (self.input_bits,)
        return self.perm, *(() if self.per_token else scales), self.split, *bits

    def product(self) -> tuple[Any, ...]:
        """Arguments of the product between the integers, or the scales measured with them, and the dtype."""
        panels = self.panels
        weight = self.integers if panels is None or panels.device.type != "cpu" else panels
        scales = (self.weight_scale,) if self.per_token else (self.weight_scale, self.input_scale)
        return weight, *scales, self.offset, self.split, *(() if self.is_float8 else (self.weight_bits,))

    @property
    def kind(self) -> tuple[object, ...]:
        """What a graph around the layer depends on; layers of one kind differ in the values of their tensors only."""
        shape = self.product()[0].shape
        flags = (self.per_token, self.asymmetric, self.perm is None)
        return self.split, self.input_bits, self.weight_bits, *flags, self.integers.dtype, tuple(shape)

    def quantizes_as(self, other: QuantizedLinear) -> bool:
        """Whether the other layer makes the same integers of the same input."""
        mine, theirs = self.quantization(), other.quantization()
        alike = (self.per_token, self.asymmetric) == (other.per_token, other.asymmetric)
        return alike and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            for a, b in zip(mine, theirs, strict=True)
        )

    def lay_out(self) -> None:
        """Make ``panels`` of the weight where the native kernels run, and drop them elsewhere."""
        here = self.integers.device.type == "cpu" and not self.is_float8 and native.ready()
        self._buffers.pop("panels", None)
        self._non_persistent_buffers_set.discard("panels")
        if here:
            self._buffers["panels"] = pack_panels(self.codes(), self.split, self.weight_bits)
            self._non_persistent_buffers_set.add("panels")

    def codes(self) -> Tensor:
        """int8 or float8 [N, K], channels in ``[normal | outlier]`` order."""
        return numerics.unpacked(self.integers, self.weight_bits)

    def deviation(self, weight: Tensor) -> float:
        """Root-mean-square distance of a float weight [N, K] from the integers in steps; clipped ones do not count."""
        codes = self.codes()
        ordered = weight.detach().to(codes.device, torch.float32)
        ordered = ordered if self.perm is None else ordered[:, self.perm]
        scheme = self.plan.scheme or Scheme(weight_bits=self.weight_bits)
        steps = group_steps(scheme, codes)
        return deviation_in_steps(ordered, codes, self.weight_scale, self.split, scheme.weight_bits, steps)

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        scheme = "" if self.plan.scheme is None else f", {self.plan.scheme.detail}"
        return f"{self.in_features}, {self.out_features}{scheme}, {len(self.plan.outliers)} outliers"

    def float_bias(self) -> Tensor:
        """The bias float64 [N] that is in the offset, up to the offset's rounding."""
        if self.input_scale is None or self.input_zero_point is None:
            return self.offset.double()
        scales = self.weight_scale, self.input_scale, self.input_zero_point
        return numerics.unfolded_bias(self.offset, self.codes(), *scales, self.split)

    def has_values_of(self, bias: Tensor | None) -> bool:
        """Whether a float bias [N] (None: zeros) is the one in the offset, but for rounding and what methods added."""
        own = self.float_bias()
        other = torch.zeros_like(own) if bias is None else bias.detach().to(own)
        if other.shape != own.shape:
            return False
        offset = self.offset.double()
        rounding = 0.0 if bias is None else torch.finfo(bias.dtype).eps
        size = 1e-5 * (offset.abs() + (offset - own).abs()) + rounding * other.abs()
        if (known := self.plan.bias_deviation) is not None:
            return float((own - other).square().mean().sqrt()) <= 1.01 * known + float(size.mean()) + 1e-30
        return bool(((own - other).abs() <= size + 1e-30).all())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or tensor is self.like:
                return moved
            return tensor.to(moved.device)

        if self.like.is_meta and not self.integers.is_meta:  # filled tensor by tensor, as loaders do
            self.set_form(self.like.dtype)
        before = self.integers
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if self.integers is not before:
            self.lay_out()
        return self

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, object],
        prefix: str,
        local_metadata: object,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        if why := self._misfit(given):
            error_msgs.append(f"layer {prefix.removesuffix('.') or self.plan.layer} is quantized: {why}")
            return
        given = {"like": self.like} | {buffer_name(name): tensor for name, tensor in given.items()}
        renamed = {prefix + name: tensor for name, tensor in given.items()}
        rest = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(renamed, prefix, *rest)
        if self.like.device != self.integers.device:
            self.set_form(self.like.dtype)
        self.lay_out()

    def _misfit(self, given: Mapping[str, object]) -> str:
        """Why tensors of a state dict by name are not those of this layer, whatever ``strict`` says; else empty."""
        own = set(_OWN.values())
        form = {name: tensor.dtype for name in own if (tensor := self._buffers[name]) is not None}
        found = {buffer_name(name): tensor for name, tensor in given.items()}
        stored = {name: tensor.dtype for name, tensor in found.items() if name in own and isinstance(tensor, Tensor)}
        weight = stored.get("integers", torch.int8)
        if "bias" in given or (weight.is_floating_point and weight.itemsize > 1):
            return "the state dict has a float weight or bias for it; load that into the float model and quantize it"
        if wrong := [name for name, dtype in stored.items() if form.get(name, dtype) != dtype]:
            return f"{wrong[0]} is {stored[wrong[0]]}, expected {form[wrong[0]]}; the state is of another recipe"
        if extra := stored.keys() - form.keys():
            return f"the state dict has {', '.join(sorted(extra))}, which this layer lacks; it is of another recipe"
        return ""
