"""Files of runtimes that read integers for the linears of Wan's blocks and for no other."""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.export.interop.layers import (
    LayerRecord,
    Options,
    StoredLayer,
    StoredModel,
    cast,
    float_tensors,
    input_scale_of,
    kept_records,
    layer_names,
    record_of,
    refuse_asymmetric,
    refuse_int4,
    refuse_mixed,
    round_per_channel,
    round_to_float8,
    sqnr,
    to_float8_tensor,
    to_single,
)


def block_file(
    model: StoredModel, options: Options, style: str, target: str, round_kept: bool = False, per_tensor: bool = False
) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    """All tensors, ``weight`` int8 [N, K] and ``weight_scale`` float32 [N, 1] for linears of blocks, and what it cost.

    Of FP8 bundles ``weight`` is float8_e4m3fn. ``per_tensor`` writes one scale without axes for it, and beside it the
    static ``input_scale``, where there is one.

    A linear that the recipe quantized elsewhere, such as the text embedding, is written in floating point. Of a model
    that is no Wan every quantized layer is int8.

    Args:
        model: the bundle.
        options: as the caller chose.
        style: the target's names.
        target: its name, for messages.
        round_kept: whether linears of a block that the recipe kept are rounded.
        per_tensor: whether the runtime's float8 has one scale per tensor.

    Raises:
        InteropError: when the bundle has what int8 with one scale cannot hold, or float8 and integers.
    """
    floats = refuse_mixed(model, target)
    refuse_int4(model, target, options)
    refuse_asymmetric(model, target)
    rounded = [layer for layer in model.kept if round_kept and _rounds(model, layer)]
    tensors = float_tensors(model, style, options, skip=rounded)
    records = kept_records(model, style, skip=rounded)
    records += [_round(model, layer, style, tensors, floats) for layer in rounded]
    for stored, name in layer_names(model, style):
        if model.naming.in_block(stored.plan.layer):
            whole = floats and per_tensor
            weight, scale, record = to_float8_tensor(stored, name) if whole else to_single(stored, name, torch.float32)
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = weight, scale
            if whole and (static := input_scale_of(stored)) is not None:
                tensors[f"{name}.input_scale"] = static
        else:
            tensors[f"{name}.weight"], record = as_float(stored, name, options)
        if stored.bias is not None:
            tensors[f"{name}.bias"] = cast(stored.bias, options)
        records.append(record)
    return tensors, records


def _rounds(model: StoredModel, layer: str) -> bool:
    return model.naming.is_wan and model.naming.in_block(layer) and f"{layer}.weight" in model.floats


def as_float(stored: StoredLayer, name: str, options: Options) -> tuple[Tensor, LayerRecord]:
    """The original weight, or what the integers stand for, in the layer's dtype."""
    source = stored.weight() if stored.original is None else stored.original
    weight = cast(source.to(stored.dtype), options)
    note = "the runtime keeps it in floating point"
    return weight, record_of(stored, name, "float", weight, note)


def _round(model: StoredModel, layer: str, style: str, tensors: dict[str, Tensor], floats: bool) -> LayerRecord:
    name, weight = model.naming.rename(layer, style), model.floats[f"{layer}.weight"]
    numbers, scale = (round_to_float8 if floats else round_per_channel)(weight)
    tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = numbers, scale
    cost = sqnr(weight, numbers.float() * scale)
    what = "float8" if floats else "integers"
    note = f"kept by the recipe; rounded, as the runtime reads {what} for every linear of a block"
    return LayerRecord(layer=layer, name=name, form="fp8" if floats else "int8", weight_sqnr_db=cost, note=note)
