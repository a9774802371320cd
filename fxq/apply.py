"""Put a calibrated bundle into the user's own module: every quantized ``nn.Linear`` becomes a :class:`QuantizedLinear`.

For models that cannot be captured or compiled. The module keeps its class, its methods and its Python code; only the
linears change.
"""

from __future__ import annotations

import copy
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxq import kernels, numerics
from fxq.ambient import own_tensors
from fxq.export import load
from fxq.ir import LAYER_TENSORS, LayerPlan, facts_of, get_tensor, plan_of, planned, stored_names
from fxq.kernels import native
from fxq.kernels.panels import pack_panels

Bundle = str | os.PathLike[str] | fx.GraphModule
"""A bundle's folder, or a module made by :func:`fxq.quantize` or :func:`fxq.load`."""

_PRODUCTS = (kernels.dual_scale_linear.definition, kernels.dual_scale_linear_per_token.definition)
MAX_DEVIATION = 1.0  # steps: nearest rounding deviates by 0.29 on average, learned rounding by less than 1


class ApplyError(ValueError):
    """A bundle that does not belong to the model it is applied to."""


class QuantizedLinear(nn.Module):
    """A linear on integers: quantization of the input, static or per token, integer product, one or two scales.

    Its buffers are the tensors of the bundle's layer (docs/bundle.md) under the same names. ``half()`` and
    ``to(dtype)`` leave them as they are; ``to(device)`` moves them. On a CPU with native kernels ``panels`` holds the
    weight once more, in their layout; it is not saved.

    Args:
        plan: of the layer.
        split: number of normal input channels.
        input_bits: bits of the activations.
        weight_bits: bits of the stored weight; 4 is packed.
        tensors: the layer's tensors by name, those of :func:`~fxq.ir.stored_names`.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    offset: Tensor
    perm: Tensor | None
    panels: Tensor | None

    def __init__(
        self, plan: LayerPlan, split: int, input_bits: int, weight_bits: int, tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.plan, self.split, self.input_bits, self.weight_bits = plan, split, input_bits, weight_bits
        self.in_features, self.out_features = plan.in_features, plan.out_features
        for name in LAYER_TENSORS:
            self.register_buffer(name, tensors.get(name))
        self.register_buffer("panels", None, persistent=False)
        self.register_load_state_dict_post_hook(_lay_out_again)  # type: ignore[no-untyped-call]
        self.lay_out()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` float [..., in_features]; returns [..., out_features] in its dtype. float64 is computed in float32."""
        if x.dtype == torch.float64:
            wide: Tensor = self.forward(x.float()).double()
            return wide
        if self.per_token:
            q, scale = kernels.quantize_per_token.definition(x, *self.quantization())
            return kernels.dual_scale_linear_per_token.definition(q, scale, *self.product(), x.dtype)
        q = kernels.quantize_act.definition(x, *self.quantization())
        return kernels.dual_scale_linear.definition(q, *self.product(), x.dtype)

    @property
    def per_token(self) -> bool:
        """Whether the scales of the input are measured per token."""
        return self.input_scale is None

    def quantization(self) -> tuple[Any, ...]:
        """Arguments of ``fxq::quantize_act``, or of ``fxq::quantize_per_token``, after the input."""
        scales = () if self.per_token else (self.input_scale, self.input_zero_point)
        return self.perm, *scales, self.split, self.input_bits

    def product(self) -> tuple[Any, ...]:
        """Arguments of the product between the integers, or the scales measured with them, and the dtype."""
        weight = self.weight if self.panels is None else self.panels
        scales = (self.weight_scale,) if self.per_token else (self.weight_scale, self.input_scale)
        return weight, *scales, self.offset, self.split, self.weight_bits

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a graph around the layer depends on; layers of one kind differ in the values of their tensors only."""
        shape = self.product()[0].shape
        flags = (self.per_token, self.perm is None)
        return self.split, self.input_bits, self.weight_bits, *flags, self.weight.dtype, tuple(shape)

    def quantizes_as(self, other: QuantizedLinear) -> bool:
        """Whether the other layer makes the same integers of the same input."""
        mine, theirs = self.quantization(), other.quantization()
        return self.per_token == other.per_token and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            for a, b in zip(mine, theirs, strict=True)
        )

    def lay_out(self) -> None:
        """Make ``panels`` of the weight where the native kernels run, and drop them elsewhere."""
        here = self.weight.device.type == "cpu" and native.ready()
        self.panels = pack_panels(self.codes(), self.split) if here else None

    def codes(self) -> Tensor:
        """int8 [N, K], channels in ``[normal | outlier]`` order."""
        return numerics.unpack_int4(self.weight) if self.weight_bits <= 4 else self.weight

    def deviation(self, weight: Tensor) -> float:
        """Root-mean-square distance of a float weight [N, K] from the integers in steps; clipped ones do not count."""
        codes, low, high = self.codes(), *numerics.integer_range(self.weight_bits)
        ordered = weight.detach().to(codes.device, torch.float32)
        if self.perm is not None:
            ordered = ordered[:, self.perm]
        total, count = 0.0, 0
        for g, part in enumerate(numerics.group_slices(self.in_features, self.split)):
            inside = (codes[:, part] > low + 1) & (codes[:, part] < high)
            steps = (ordered[:, part] / self.weight_scale[g][:, None] - codes[:, part])[inside]
            total, count = total + float(steps.square().sum()), count + steps.numel()
        return (total / max(count, 1)) ** 0.5

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        scheme = "" if self.plan.scheme is None else f", {self.plan.scheme.detail}"
        return f"{self.in_features}, {self.out_features}{scheme}, {len(self.plan.outliers)} outliers"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        before = self.weight
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if self.weight is not before:
            self.lay_out()
        return self


def _lay_out_again(module: nn.Module, keys: object) -> None:
    assert isinstance(module, QuantizedLinear)
    module.lay_out()


def read_layers(bundle: Bundle) -> tuple[dict[str, QuantizedLinear], set[str]]:
    """The quantized layers of a bundle, and the names of the linears that it keeps in model dtype on purpose.

    Raises:
        BundleError: as :func:`fxq.load`.
        ApplyError: when it was optimized for a device, or not made by fxq.
    """
    module = bundle if isinstance(bundle, fx.GraphModule) else load(bundle)
    try:
        facts = facts_of(module)
    except ValueError as error:
        raise ApplyError(f"{error}; give the folder or the module that fxq.quantize made") from None
    layers: dict[str, QuantizedLinear] = {}
    kept = set(facts.get("never_called", ()))
    for name, (plan, nodes) in planned(module).items():
        if plan.scheme is None:
            kept.add(name)
        else:
            layers[name] = _layer(module, name, nodes[0])
    if not layers:
        raise ApplyError("the bundle has no quantized layer: nothing to apply")
    return layers, kept


def _layer(module: fx.GraphModule, name: str, node: fx.Node) -> QuantizedLinear:
    plan = plan_of(node)
    if plan is None or node.target not in _PRODUCTS:
        raise ApplyError(
            f"layer {name} is {node.target}, expected fxq::dual_scale_linear: an optimized module fits its own graph "
            "only; give the module it was made from"
        )
    q, split, weight_bits = node.args[0], node.args[5], node.args[6]
    assert isinstance(q, fx.Node) and isinstance(split, int) and isinstance(weight_bits, int)
    quantize = q.args[0] if q.target is operator.getitem else q
    assert isinstance(quantize, fx.Node)
    input_bits = quantize.args[-1]
    assert isinstance(input_bits, int)
    tensors = {n: get_tensor(module, f"{name}.{n}") for n in stored_names(plan)}
    return QuantizedLinear(plan, split, input_bits, weight_bits, tensors)


def match(model: nn.Module, layers: Mapping[str, QuantizedLinear], kept: set[str]) -> dict[str, nn.Parameter]:
    """The model's float weight of every layer, by layer name.

    Warns of linears that the bundle does not know; they stay in model dtype.

    Raises:
        ApplyError: naming layers that the model does not have, and weights of another shape or with other values.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {layer: parameters.get(f"{layer}.weight", parameters.get(layer)) for layer in layers}
    if missing := [layer for layer, weight in found.items() if weight is None]:
        raise ApplyError(
            f"the model has no parameter for {len(missing)} of {len(layers)} layers of the bundle: "
            f"{', '.join(missing[:4])}; give the model that was calibrated, whole and before other changes"
        )
    weights = {layer: weight for layer, weight in found.items() if weight is not None}
    for layer, weight in weights.items():
        check_weight(layers[layer], weight)
    known = {id(weight) for weight in weights.values()}
    unknown = [n for n, m in _linears(model) if id(m.weight) not in known and n not in kept]
    if unknown:
        warnings.warn(
            f"the bundle does not know {len(unknown)} linears, they stay in model dtype: {', '.join(unknown)}",
            stacklevel=3,
        )
    return weights


def check_weight(layer: QuantizedLinear, weight: Tensor) -> None:
    """Make sure that a layer's integers were made from a float weight.

    Raises:
        ApplyError: when the shape differs or the values are more than rounding apart.
    """
    name, shape = layer.plan.layer, (layer.out_features, layer.in_features)
    if tuple(weight.shape) != shape:
        raise ApplyError(
            f"layer {name} of the bundle is {shape}, the model's weight {tuple(weight.shape)}; "
            "give the model that was calibrated"
        )
    if not (apart := layer.deviation(weight)) <= MAX_DEVIATION:
        raise ApplyError(
            f"layer {name}: the model's weight is {apart:.3g} steps from the bundle's integers, at most "
            f"{MAX_DEVIATION:g} is rounding: these are other weights, or the recipe changed them before rounding; "
            "quantize this model, or run the bundle's own graph (fxq.load)"
        )


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            yield name, module


@own_tensors()
def apply(model: nn.Module, bundle: Bundle, *, in_place: bool = False) -> nn.Module:
    """Swap the linears of a model for the quantized ones of a bundle; their float weights are freed.

    The result computes what the quantized graph does, up to the rounding of float operations. Hooks of swapped linears
    are not carried over.

    Args:
        model: the model that was calibrated, with its float weights, in any dtype and on any device.
        bundle: what to apply; not changed.
        in_place: change ``model`` itself; otherwise a copy, which shares no tensor with it.

    Returns:
        The module; its quantized layers are :class:`QuantizedLinear`.

    Raises:
        BundleError: as :func:`fxq.load`.
        ApplyError: when names, shapes or values do not fit, or a weight is not of a plain ``nn.Linear``.
    """
    layers, kept = read_layers(bundle)
    layers = copy.deepcopy(layers) if isinstance(bundle, fx.GraphModule) else layers
    swaps: dict[int, QuantizedLinear] = {}
    for layer, weight in match(model, layers, kept).items():
        owners = [module for _, module in _linears(model) if module.weight is weight]
        if not owners or any(type(module) is not nn.Linear for module in owners):
            kind = type(owners[0]).__name__ if owners else "a parameter that other code reads"
            raise ApplyError(
                f"layer {layer} is {kind}, expected nn.Linear: it cannot be swapped; exclude it by a rule, or use "
                'torch.compile(model, backend="fxq")'
            )
        new = layers[layer].to(weight.device).train(model.training)
        swaps |= {id(module): new for module in owners}
    if not in_place:
        memo: dict[int, Any] = dict(swaps)
        return copy.deepcopy(model, memo)
    if id(model) in swaps:
        raise ApplyError("the model is itself the linear to swap; use in_place=False")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in swaps:
                setattr(module, name, swaps[id(child)])
    return model
