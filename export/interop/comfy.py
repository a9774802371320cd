"""ComfyUI: ``int8_tensorwise`` for 8-bit and ``asym_w4a8_int8`` (rotated) for 4-bit layers, Wan's original names."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from fxq.export.interop.layers import (
    LayerRecord,
    Options,
    Output,
    StoredLayer,
    StoredModel,
    cast,
    float_tensors,
    kept_records,
    layer_names,
    refuse_asymmetric,
    sqnr,
    to_int8,
)
from fxq.export.interop.names import ORIGINAL
from fxq.export.interop.rotation import GROUP, quantize_rotated, rotation_size

FILE = "model.safetensors"


def build(model: StoredModel, options: Options) -> Output:
    """8 bits: ``weight`` int8 [N, K], ``weight_scale`` float32 [N, 1]. 4 bits: see :func:`_rotated`.

    Each quantized layer has a marker ``comfy_quant`` (uint8, JSON); the header's ``_quantization_metadata`` repeats
    them. A 4-bit layer whose width no rotation divides is stored as 8 bits.
    """
    refuse_asymmetric(model, "ComfyUI")
    tensors = float_tensors(model, ORIGINAL, options)
    records = kept_records(model, ORIGINAL)
    markers: dict[str, dict[str, object]] = {}
    for stored, name in layer_names(model, ORIGINAL):
        size = rotation_size(stored.plan.in_features) if stored.bits == 4 else None
        own, markers[name], record = _int8(stored, name) if size is None else _rotated(stored, name, size)
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        tensors[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(markers[name]).encode()), dtype=torch.uint8)
        if stored.bias is not None:
            tensors[f"{name}.bias"] = cast(stored.bias, options)
        records.append(record)
    header = json.dumps({"format_version": "1.0", "layers": markers})
    metadata = {"format": "pt", "_quantization_metadata": header}
    return Output(tensors={FILE: (tensors, metadata)}, documents={}, records=records)


def _int8(stored: StoredLayer, name: str) -> tuple[dict[str, Tensor], dict[str, object], LayerRecord]:
    integers, scale, record = to_int8(stored, name, torch.float32)
    return {"weight": integers, "weight_scale": scale}, {"format": "int8_tensorwise"}, record


def _rotated(stored: StoredLayer, name: str, size: int) -> tuple[dict[str, Tensor], dict[str, object], LayerRecord]:
    """The layer as ``asym_w4a8_int8``.

    ``weight`` int8 [N, K / 2], ``weight_s_rel`` float8_e4m3fn [N, K / 16], ``weight_s_channel`` float32 [N] and
    ``weight_codebook`` float32 [16].
    """
    weight = stored.weight()
    found = quantize_rotated(weight, size)
    tensors = {
        "weight": found.packed(),
        "weight_s_rel": found.group_scale,
        "weight_s_channel": found.channel_scale,
        "weight_codebook": found.codebook,
    }
    marker = {"format": "asym_w4a8_int8", "group_size": GROUP, "convrot_groupsize": size}
    record = LayerRecord(
        layer=stored.plan.layer,
        name=name,
        form="int4 rotated",
        weight_sqnr_db=sqnr(weight, found.weight()),
        note=f"rounded again after a rotation of {size} channels",
    )
    return tensors, marker, record
