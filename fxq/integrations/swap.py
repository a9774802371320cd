"""Put a calibrated bundle into the user's own module: every quantized ``nn.Linear`` becomes a :class:`QuantizedLinear`.

For models that cannot be captured or compiled. The module keeps its class, its methods and its Python code; only the
linears change.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, fx, nn

from fxq.core.config import plain_layer
from fxq.core.facts import Facts
from fxq.core.ir import planned
from fxq.core.layer import LayerError, LayerTensors, QuantizedLayer, told_in_graph
from fxq.export import load
from fxq.integrations.names import NamesError, Renaming, renaming, weights_of
from fxq.integrations.quantized_linear import QuantizedLinear
from fxq.integrations.reach import holders
from fxq.integrations.stand_in import ApplyError
from fxq.metrics.deviation import MOST_DEVIATION
from fxq.runtime.ambient import own_tensors
from fxq.runtime.memory.offload import absent_weights

__all__ = ["ApplyError", "Bundle", "QuantizedLinear", "apply", "check_weight", "match", "read_layers"]

Bundle = str | os.PathLike[str] | fx.GraphModule
"""A bundle's folder, or a module made by :func:`fxq.quantize` or :func:`fxq.load`."""


def read_layers(bundle: Bundle) -> tuple[dict[str, QuantizedLinear], set[str]]:
    """The quantized layers of a bundle, and the names of the linears that it keeps in model dtype on purpose.

    Raises:
        BundleError: as :func:`fxq.load`.
        ApplyError: when it was optimized for a device, not made by fxq, or made with transforms.
    """
    module = bundle if isinstance(bundle, fx.GraphModule) else load(bundle)
    try:
        facts = Facts.of(module)
    except ValueError as error:
        raise ApplyError(f"{error}; give the folder or the module that fxq.quantize made") from None
    layers: dict[str, QuantizedLinear] = {}
    kept, notes = set(facts.never_called), planned(module)
    if reason := told_in_graph((plan for plan, _ in notes.values()), "a model that is given the bundle's integers"):
        raise ApplyError(reason)
    for name, (plan, nodes) in notes.items():
        if plan.scheme is None:
            kept.add(name)
        else:
            layers[name] = _layer(module, name, nodes[0])
    if not layers:
        raise ApplyError("the bundle has no quantized layer: nothing to apply")
    return layers, kept


def _layer(module: fx.GraphModule, name: str, node: fx.Node) -> QuantizedLinear:
    try:
        layer = QuantizedLayer.of(node)
        if layer.frozen:
            tensors = LayerTensors.of(module, layer.plan).by_name()
            return QuantizedLinear(layer.plan, layer.split, layer.input_bits, layer.bits, tensors)
    except LayerError as error:
        cause: LayerError | None = error
    else:
        cause = None
    raise ApplyError(
        f"layer {name} is {node.target}, expected a product that is fused with nothing: an optimized module fits its "
        "own graph only; give the module it was made from"
    ) from cause


def match(model: nn.Module, layers: Mapping[str, QuantizedLinear], kept: set[str]) -> dict[str, nn.Parameter]:
    """The model's float weight of every layer, by layer name; wrappers around the model, or none, change nothing.

    Warns of linears that the bundle does not know; they stay in model dtype.

    Raises:
        ApplyError: naming layers that the model does not have, weights and biases of another shape or with other
            values, and weights that are offloaded.
    """
    if absent := absent_weights(model):
        raise ApplyError(absent)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    try:
        change = renaming(layers, kept, parameters)
    except NamesError as error:
        raise ApplyError(str(error)) from error
    names = weights_of(layers, change or Renaming(), parameters)
    if missing := [layer for layer, name in names.items() if name is None]:
        raise ApplyError(
            f"the model has no parameter for {len(missing)} of {len(layers)} layers of the bundle: "
            f"{', '.join(missing[:4])}; {_cause(missing[0], parameters)}"
        )
    weights = {layer: parameters[name] for layer, name in names.items() if name is not None}
    linears = list(_linears(model))
    for layer, weight in weights.items():
        check_weight(layers[layer], weight)
        for _, linear in linears:
            if linear.weight is weight:
                check_bias(layers[layer], linear.bias)
    known = {id(weight) for weight in weights.values()}
    spared = {change(name) for name in kept} if change is not None else kept
    unknown = [n for n, m in linears if id(m.weight) not in known and plain_layer(n) not in spared]
    if unknown:
        warnings.warn(
            f"the bundle does not know {len(unknown)} linears, they stay in model dtype: {', '.join(unknown)}",
            stacklevel=3,
        )
    return weights


_CAUSES = {
    "base_layer.weight": "an adapter is around it: merge or unload the adapter first (peft: merge_and_unload)",
    "parametrizations.weight.original": "it is parametrized: torch.nn.utils.parametrize.remove_parametrizations first",
    "parametrizations.weight.original0": "it is parametrized: torch.nn.utils.parametrize.remove_parametrizations first",
    "weight_orig": "it is pruned or normalized: torch.nn.utils.prune.remove or remove_spectral_norm first",
    "weight_g": "it is normalized: torch.nn.utils.remove_weight_norm first",
}


def _cause(layer: str, parameters: Collection[str]) -> str:
    """Why a layer has no weight, or what to give."""
    for ending, cause in _CAUSES.items():
        if any(f".{plain_layer(name)}".endswith(f".{layer}.{ending}") for name in parameters):
            return f"{layer}: {cause}"
    return "give the model that was calibrated, whole and before other changes"


def check_weight(layer: QuantizedLinear, weight: Tensor) -> None:
    """Make sure that a layer's integers were made from a float weight.

    Raises:
        ApplyError: when the shape differs, the values are more than rounding apart, or there are none.
    """
    name, shape = layer.plan.layer, (layer.out_features, layer.in_features)
    if tuple(weight.shape) != shape:
        raise ApplyError(
            f"layer {name} of the bundle is {shape}, the model's weight {tuple(weight.shape)}; "
            "give the model that was calibrated"
        )
    if weight.is_meta:
        raise ApplyError(
            f"layer {name}: the model's weight has no values (device meta); is it offloaded? Load it first"
        )
    if not (apart := layer.deviation(weight)) <= MOST_DEVIATION:
        raise ApplyError(
            f"layer {name}: the model's weight is {apart:.3g} steps from the bundle's integers, at most "
            f"{MOST_DEVIATION:g} is rounding: these are other weights, or the recipe changed them before rounding; "
            "quantize this model, or run the bundle's own graph (fxq.load)"
        )


def check_bias(layer: QuantizedLinear, bias: Tensor | None) -> None:
    """Make sure that a layer's offset was made from a float bias [N], or from none.

    Raises:
        ApplyError: when it was not.
    """
    if not layer.has_values_of(bias):
        what = "no bias, the quantized layer has one" if bias is None else "another bias than the quantized layer"
        raise ApplyError(
            f"layer {layer.plan.layer}: the model has {what}; quantize this model, or run the bundle's own graph "
            "(fxq.load)"
        )


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            yield name, module


@own_tensors()
def apply(model: nn.Module, bundle: Bundle, *, in_place: bool = False) -> nn.Module:
    """Swap the linears of a model for the quantized ones of a bundle; their float weights are freed.

    The result computes what the quantized graph does, up to the rounding of float operations. A swapped linear keeps
    its identity (in the copy, the copy's), hooks and attributes, so every list, closure or bound method that holds it
    computes with integers. Its ``weight`` and ``bias`` keep their dtype, device and shape; code that reads their values
    gets an error with the layer's name. Backward hooks are warned of: integers have no gradients.

    Args:
        model: the model that was calibrated, with its float weights, in any dtype and on any device, in a wrapper or
            out of one.
        bundle: what to apply; not changed.
        in_place: change ``model`` itself; otherwise a copy, which shares no tensor with it.

    Returns:
        The module; its quantized layers are :class:`QuantizedLinear`.

    Raises:
        BundleError: as :func:`fxq.load`.
        ApplyError: when names, shapes or values do not fit, a weight is not of a plain ``nn.Linear`` or held by other
            code as well, or a copy would still reach the model's own linears (through a function's variable).
    """
    layers, kept = read_layers(bundle)
    layers = copy.deepcopy(layers) if isinstance(bundle, fx.GraphModule) else layers
    swaps: dict[int, tuple[nn.Linear, QuantizedLinear]] = {}
    for layer, weight in match(model, layers, kept).items():
        owners = [module for _, module in _linears(model) if module.weight is weight]
        if not owners or any(type(module) is not nn.Linear for module in owners):
            kind = type(owners[0]).__name__ if owners else "a parameter that other code reads"
            raise ApplyError(
                f"layer {layer} is {kind}, expected nn.Linear: it cannot be swapped; exclude it by a rule, or use "
                'torch.compile(model, backend="fxq")'
            )
        new = layers[layer].to(weight.device)
        new.set_form(weight.dtype)
        new.has_bias = owners[0].bias is not None
        swaps |= {id(module): (module, new) for module in owners}
    _check_weights_elsewhere(model, swaps)
    _warn_of_hooks(model, swaps)
    if not in_place:
        return _swapped_copy(model, swaps)
    for linear, new in swaps.values():
        new.take_over(linear)
    return model


def _swapped_copy(model: nn.Module, swaps: Mapping[int, tuple[nn.Linear, QuantizedLinear]]) -> nn.Module:
    """A copy of the model in which linears are layers; no float weight of theirs is copied."""
    shells = {key: nn.Linear.__new__(nn.Linear) for key in swaps}
    memo: dict[int, object] = dict(shells)
    copied = copy.deepcopy(model, memo)
    for key, (linear, new) in swaps.items():
        others = {name: p for name, p in linear._parameters.items() if name not in ("weight", "bias")}
        state = vars(linear) | {"_parameters": others}
        shells[key].__dict__.update({name: copy.deepcopy(value, memo) for name, value in state.items()})
        new.take_over(shells[key])
    for found in holders(copied, swaps).values():
        raise ApplyError(
            f"the copy still reaches a float linear of the model through {found[0].path}, which copying does not "
            "follow: use in_place=True, on a model that you load anew if you need both"
        )
    return copied


def _check_weights_elsewhere(model: nn.Module, swaps: Mapping[int, tuple[nn.Linear, QuantizedLinear]]) -> None:
    """Refuse weights that other code holds too, and warn of embeddings, which go on reading the floats they hold."""
    weights = {id(linear.weight): new.plan.layer for linear, new in swaps.values()}
    tables = {id(linear._parameters) for linear, _ in swaps.values()}
    for key, found in holders(model, weights).items():
        for holder in found:
            if id(holder.owner) in tables or (id(holder.owner) in swaps and holder.path.rpartition(".")[2] == "weight"):
                continue
            if isinstance(holder.owner, nn.Embedding | nn.EmbeddingBag):
                warnings.warn(
                    f"layer {weights[key]}: {holder.path} is the same weight and stays in floats", stacklevel=3
                )
                continue
            raise ApplyError(
                f"layer {weights[key]}: its weight is also held as {holder.path}, where code would go on reading "
                "floats; exclude the layer by a rule, or remove the other reference"
            )


def _warn_of_hooks(model: nn.Module, swaps: Mapping[int, tuple[nn.Linear, QuantizedLinear]]) -> None:
    hooked = [
        name
        for name, module in _linears(model)
        if id(module) in swaps and (module._backward_hooks or module._backward_pre_hooks)
    ]
    if hooked:
        warnings.warn(
            f"backward hooks of {', '.join(hooked)} will not be called: quantized layers have no gradients",
            stacklevel=3,
        )
