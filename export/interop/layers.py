"""What a bundle holds, read back as plain weights, and the steps the foreign formats share."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, fx

from fxq.core.facts import Facts
from fxq.core.ir import LAYER_TENSORS, LayerPlan, example_value, get_tensor, planned
from fxq.core.layer import LayerTensors, QuantizedLayer, told_in_graph
from fxq.export.bundle import TENSORS, load, read_manifest
from fxq.export.interop.names import Naming
from fxq.export.interop.stored import (
    FLOAT8_PER_TOKEN,
    FLOAT8_STATIC,
    PER_TOKEN,
    InteropError,
    LayerRecord,
    Options,
    Output,
    StoredLayer,
    StoredModel,
)
from fxq.export.receipt import make_receipt
from fxq.kernels import float8
from fxq.numerics import decibels, energy
from fxq.passes.methods.float_ranges import search_float_weight
from fxq.passes.methods.ranges import RangeSearch
from fxq.passes.transforms.conv_rot import ConvRot

__all__ = [
    "ASYMMETRIC",
    "FLOAT8_PER_TOKEN",
    "FLOAT8_STATIC",
    "MERGED",
    "PER_TENSOR",
    "PER_TOKEN",
    "InteropError",
    "LayerRecord",
    "NamedTensors",
    "Options",
    "Output",
    "StoredLayer",
    "StoredModel",
    "cast",
    "float_tensors",
    "input_scale_of",
    "int8_file",
    "kept_records",
    "layer_names",
    "read_model",
    "record_of",
    "refuse_asymmetric",
    "refuse_int4",
    "refuse_mixed",
    "round_per_channel",
    "round_to_float8",
    "sqnr",
    "to_float8_tensor",
    "to_single",
]

_CONSTANT = re.compile(r"(c_)?lifted_tensor_\d+|_tensor_constant\d+")
ASYMMETRIC = "int8 per token with a zero point, measured at run time"
CONVROT = ConvRot.__name__
PER_TENSOR = "scales of output channels merged into one per tensor"
MERGED = "two scales merged into one per output channel"


def read_model(path: str | os.PathLike[str], rotated: bool = False) -> StoredModel:
    """Read a bundle's layers back.

    Args:
        path: of the bundle.
        rotated: whether the reader knows :attr:`StoredLayer.rotation`.

    Raises:
        BundleError: as :func:`fxq.load`.
        InteropError: when transforms hold a part of what layers compute.
    """
    module, manifest = load(path), read_manifest(path)
    plans = planned(module)
    unknown = [plan for plan, _ in plans.values() if not (rotated and plan.transform == CONVROT)]
    if reason := told_in_graph(unknown, "another tool's format"):
        rotations = "; the targets comfy and sglang rotate as ConvRot does"
        raise InteropError(reason + (rotations if {plan.transform for plan in unknown} <= {"", CONVROT} else ""))
    names = [str(node.target) for node in module.graph.find_nodes(op="get_attr")]
    naming = Naming.of([*names, *(f"{layer}.weight" for layer in plans)])
    layers = {
        name: _layer(module, plan, nodes[0], naming.is_wan)
        for name, (plan, nodes) in plans.items()
        if plan.scheme is not None
    }
    own = {f"{layer}.{tensor}" for layer in layers for tensor in (*LAYER_TENSORS, *ConvRot.stores)}
    constants = tuple(sorted({name for name in names if _CONSTANT.fullmatch(name)}))
    floats = {name: get_tensor(module, name) for name in sorted(set(names) - own - set(constants))}
    receipt = make_receipt(manifest.fxq_version, Facts.of(module), (plan for plan, _ in plans.values()), {})
    return StoredModel(
        layers=layers,
        kept=tuple(name for name, (plan, _) in plans.items() if plan.scheme is None),
        floats=floats,
        constants=constants,
        naming=naming,
        receipt=dataclasses.replace(receipt, source=manifest.files[TENSORS]),
        head_size=_head_size(module),
    )


def _head_size(module: fx.GraphModule) -> int | None:
    """Last size of a cached key [B, P, heads, channels] among the inputs, by the names of fxq's causal Wan."""
    for node in module.graph.find_nodes(op="placeholder"):
        value = example_value(node)
        if str(node.target).startswith("prefix_k") and value is not None and value.ndim == 4:
            return int(value.shape[-1])
    return None


def _layer(module: fx.GraphModule, plan: LayerPlan, node: fx.Node, is_wan: bool) -> StoredLayer:
    """A layer; a bias of zeros is there in Wan, all of whose linears have one, and readers miss it."""
    stored, dtype = LayerTensors.of(module, plan), QuantizedLayer.of(node).dtype
    bias = stored.bias()
    return StoredLayer(
        plan=plan,
        integers=stored.codes(),
        weight_scale=stored.weight_scale,
        input_scale=stored.input_scale,
        perm=stored.perm,
        bias=bias.to(dtype) if is_wan or bool(bias.any()) else None,
        dtype=dtype,
        rotation=_rotation_of(module, plan) if plan.transform == CONVROT else None,
    )


def _rotation_of(module: fx.GraphModule, plan: LayerPlan) -> int:
    """Channels of the rotation in a layer's graph: the recipe's, or the largest that divides the width."""
    transforms: Any = Facts.of(module).recipe.get("transforms", ())
    found = next((ConvRot(entry["block"]) for entry in transforms if entry["transform"] == CONVROT), ConvRot())
    return found.size_of(plan.in_features)


def round_per_channel(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Symmetric int8 [N, K] and scale [N, 1] of a float weight, by the largest value of each output channel."""
    top = weight.float().abs().amax(dim=1, keepdim=True)
    least = torch.finfo(scale_dtype).tiny
    scale = torch.where(top > 0, (top / 127).clamp(min=least), 1.0).to(scale_dtype)
    return (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def round_to_float8(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [N, K] and scale [N, 1] of a float weight, by the largest value of each output channel."""
    top = weight.float().abs().amax(dim=1, keepdim=True)
    scale = torch.where(top > 0, (top / float8.LARGEST).clamp(min=torch.finfo(scale_dtype).tiny), 1.0).to(scale_dtype)
    return float8.round_to(weight.float() / scale.float()), scale


def to_float8_tensor(layer: StoredLayer, name: str) -> tuple[Tensor, Tensor, LayerRecord]:
    """A float8 layer as float8_e4m3fn [N, K] with one scale, float32 of no axes, for the whole, and what that cost.

    Its scale per output channel does not fit: the original weight is rounded, or the dequantized one where the caller
    did not give the original.
    """
    source = layer.weight() if layer.original is None else layer.original
    scale = search_float_weight(source.float().reshape(1, -1), (), RangeSearch().ratios)[0]
    values = float8.round_to(source.float() / scale)
    note = PER_TENSOR if layer.original is None else "one scale per tensor, of the original weight"
    return values, scale, record_of(layer, name, "fp8", values.float() * scale, note)


def refuse_mixed(model: StoredModel, target: str) -> bool:
    """Whether all layers are float8; False where none is.

    Raises:
        InteropError: when some are, naming both.
    """
    kinds = {layer.is_float8: name for name, layer in model.layers.items()}
    if len(kinds) > 1:
        raise InteropError(
            f"the bundle has FP8 layers ({kinds[True]}) and layers of integers ({kinds[False]}); {target} reads one of "
            "the two per file. Quantize all with one format, or take the target comfy"
        )
    return next(iter(kinds), False)


def input_scale_of(layer: StoredLayer) -> Tensor | None:
    """The static input scale of a float8 layer, float32 of no axes, the larger of two; None where it is measured."""
    return None if layer.input_scale is None or not layer.is_float8 else layer.input_scale.max()


def sqnr(want: Tensor, got: Tensor) -> float | None:
    """Energy of ``want`` over that of the difference in dB; None when there is no difference."""
    found = decibels(energy(want), energy(want.double() - got.double()))
    return None if math.isinf(found) and found > 0 else round(found, 2)


def to_single(layer: StoredLayer, name: str, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, LayerRecord]:
    """The layer as int8, or float8, [N, K] with one scale [N, 1] per output channel, and what that cost.

    A layer of one scale keeps its numbers. Of two scales the original weight is rounded, or the dequantized one where
    the caller did not give the original.
    """
    single = layer.single_scale()
    source = layer.weight() if layer.original is None else layer.original
    rounding = round_to_float8 if layer.is_float8 else round_per_channel
    integers, scale = rounding(source, scale_dtype) if single is None else single
    scale = scale.to(scale_dtype)
    merged = "" if single is not None else MERGED if layer.original is None else "one scale, of the original weight"
    widened = f"int{layer.plan.quantization.weight_bits} in a byte" if layer.plan.quantization.weight_bits < 8 else ""
    note = "; ".join(filter(None, (merged, widened)))
    form = "fp8" if layer.is_float8 else "int8"
    return integers, scale, record_of(layer, name, form, integers.float() * scale.float(), note)


def record_of(layer: StoredLayer, name: str, form: str, written: Tensor, note: str = "") -> LayerRecord:
    """What became of a quantized linear that a file holds as ``written`` [N, K] in floats."""
    original = None if layer.original is None else sqnr(layer.original, written)
    cost = sqnr(layer.weight(), written)
    return LayerRecord(
        layer=layer.plan.layer, name=name, form=form, weight_sqnr_db=cost, note=note, original_sqnr_db=original
    )


def refuse_int4(model: StoredModel, target: str, options: Options) -> None:
    """Refuse int4 layers for a target without int4, unless they may be widened.

    Raises:
        InteropError: naming layers and what to do.
    """
    four = [name for name, layer in model.layers.items() if layer.bits == 4]
    if four and not options.widen:
        raise InteropError(
            f"{len(four)} layers have 4-bit weights ({', '.join(four[:3])}); {target} has no 4-bit weights with 8-bit "
            "inputs. Quantize with a w8a8 recipe for it, take the target comfy, or allow int4 in bytes (widen=True, "
            "--widen-int4): as large as w8a8 and no better than w4a8"
        )


def refuse_asymmetric(model: StoredModel, target: str) -> None:
    """Refuse layers that measure zero points for a target that measures scales alone.

    Raises:
        InteropError: naming layers and what to do.
    """
    measured = [name for name, layer in model.layers.items() if layer.plan.quantization.asymmetric]
    if measured:
        raise InteropError(
            f"{len(measured)} layers measure zero points per token ({', '.join(measured[:3])}); {target} measures "
            "scales alone, and their outputs would be worse than the bundle's. Quantize without asymmetric for it, or "
            "take the target compressed-tensors, diffusers or onnx"
        )


def cast(tensor: Tensor, options: Options) -> Tensor:
    """A tensor that stays in floating point, in the dtype the caller chose."""
    keep = options.float_dtype is None or not tensor.is_floating_point()
    return tensor if keep else tensor.to(options.float_dtype)


class NamedTensors(dict[str, Tensor]):
    """Tensors of a file by name. Two of one name are an error: the last of them would be the only one."""

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if name in self:
            raise InteropError(
                f"two tensors of the export are {name!r} under the target's names: rename the one of the model that is "
                "not a layer's own, or keep the layer by a rule"
            )
        super().__setitem__(name, tensor)

    def __ior__(self, other: Any) -> Self:  # type: ignore[misc,override]  # what dict does would replace in silence
        for name, tensor in dict(other).items():
            self[name] = tensor
        return self

    def update(self, *args: object, **kwargs: Tensor) -> None:
        """Add tensors, each under a name of its own."""
        self |= dict(*args, **kwargs)


def float_tensors(model: StoredModel, style: str, options: Options, skip: Iterable[str] = ()) -> dict[str, Tensor]:
    """Every tensor outside of quantized linears under the target's names, without those of the layers in ``skip``."""
    left = {f"{layer}.weight" for layer in skip}
    found = NamedTensors()
    for name, tensor in model.floats.items():
        if name not in left:
            found[model.naming.rename(name, style)] = cast(tensor, options)
    return found


def layer_names(model: StoredModel, style: str) -> Iterator[tuple[StoredLayer, str]]:
    """Quantized linears with their names in a target's style."""
    for layer, stored in model.layers.items():
        yield stored, model.naming.rename(layer, style)


def int8_file(
    model: StoredModel, options: Options, style: str, target: str, scale_dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    """All tensors for a target whose layers are ``weight`` int8 [N, K] and ``weight_scale`` [N, 1], and what it cost.

    Float8 layers are the same in float8, and have an ``input_scale`` [1] where theirs is static.

    Args:
        model: the bundle.
        options: as the caller chose.
        style: the target's names.
        target: its name, for messages.
        scale_dtype: of the scales; None: the layer's own dtype.

    Raises:
        InteropError: when layers have 4 bits and may not be widened.
    """
    refuse_int4(model, target, options)
    tensors = float_tensors(model, style, options)
    records = kept_records(model, style)
    for stored, name in layer_names(model, style):
        dtype = scale_dtype or options.float_dtype or stored.dtype
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], record = to_single(stored, name, dtype)
        if (static := input_scale_of(stored)) is not None:
            tensors[f"{name}.input_scale"] = static.reshape(1).to(dtype)
        if stored.bias is not None:
            tensors[f"{name}.bias"] = cast(stored.bias, options)
        records.append(record)
    return tensors, records


def kept_records(model: StoredModel, style: str, skip: Iterable[str] = ()) -> list[LayerRecord]:
    """Records of the linears that the bundle keeps in floating point."""
    left = set(skip)
    return [
        LayerRecord(layer=layer, name=model.naming.rename(layer, style), form="float", note="kept by the recipe")
        for layer in model.kept
        if layer not in left
    ]
