"""LightX2V: int8 linears of the blocks under Wan's original names, one file, and the keys of the run config."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fxq.export.interop.layers import (
    LayerRecord,
    Options,
    Output,
    StoredModel,
    cast,
    float_tensors,
    kept_records,
    layer_names,
    refuse_asymmetric,
    refuse_int4,
    round_per_channel,
    sqnr,
    to_int8,
)
from fxq.export.interop.names import ORIGINAL, OWN

FILE = "model.safetensors"
_QUANTIZED = re.compile(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.")


def build(model: StoredModel, options: Options) -> Output:
    """``<layer>.weight`` int8 [N, K] and ``<layer>.weight_scale`` float32 [N, 1].

    The runtime reads integers for all linears of the blocks and for no other: a linear that the recipe kept there is
    rounded here, one that it quantized elsewhere (the text embedding) is written in floating point.
    """
    refuse_int4(model, "LightX2V", options)
    refuse_asymmetric(model, "LightX2V")
    wanted = {layer for layer in (*model.layers, *model.kept) if _wants(model, layer)}
    rounded = [layer for layer in model.kept if layer in wanted and f"{layer}.weight" in model.floats]
    tensors = float_tensors(model, ORIGINAL, options, skip=rounded)
    records = kept_records(model, ORIGINAL, skip=rounded)
    for layer in rounded:
        records.append(_round(model, layer, tensors))
    for stored, name in layer_names(model, ORIGINAL):
        if stored.plan.layer in wanted:
            tensors[f"{name}.weight"], scale, record = to_int8(stored, name, torch.float32)
            tensors[f"{name}.weight_scale"] = scale
        else:
            tensors[f"{name}.weight"] = cast(stored.weight().to(stored.dtype), options)
            note = "the runtime keeps it in floating point"
            cost = sqnr(stored.weight(), tensors[f"{name}.weight"])
            record = LayerRecord(layer=stored.plan.layer, name=name, form="float", weight_sqnr_db=cost, note=note)
        if stored.bias is not None:
            tensors[f"{name}.bias"] = cast(stored.bias, options)
        records.append(record)
    config = {"dit_quantized": True, "dit_quant_scheme": "int8-triton", "dit_quantized_ckpt": FILE}
    return Output(tensors={FILE: (tensors, {"format": "pt"})}, documents={"lightx2v.json": config}, records=records)


def _wants(model: StoredModel, layer: str) -> bool:
    return (
        layer in model.layers
        if model.naming.style == OWN
        else bool(_QUANTIZED.match(model.naming.rename(layer, ORIGINAL) + "."))
    )


def _round(model: StoredModel, layer: str, tensors: dict[str, Tensor]) -> LayerRecord:
    name, weight = model.naming.rename(layer, ORIGINAL), model.floats[f"{layer}.weight"]
    integers, scale = round_per_channel(weight)
    tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = integers, scale
    cost = sqnr(weight, integers * scale)
    note = "kept by the recipe; rounded, as the runtime reads integers for every linear of a block"
    return LayerRecord(layer=layer, name=name, form="int8", weight_sqnr_db=cost, note=note)
