"""ComfyUI: ``float8_e4m3fn``, ``int8_tensorwise``, rotated or not, rotated ``asym_w4a8_int8``; Wan's original names."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from fxq.export.interop.blocks import as_float
from fxq.export.interop.layers import (
    FLOAT8_STATIC,
    MERGED,
    PER_TOKEN,
    InteropError,
    LayerRecord,
    Options,
    Output,
    StoredLayer,
    StoredModel,
    cast,
    float_tensors,
    input_scale_of,
    kept_records,
    layer_names,
    record_of,
    refuse_asymmetric,
    round_per_channel,
    to_float8_tensor,
    to_single,
)
from fxq.export.interop.names import ORIGINAL
from fxq.export.interop.rotation import GROUP, quantize_rotated, rotate, rotation_size

FILE = "model.safetensors"
_IN_FLOAT = "floats, or float8 as ComfyUI is set: it has no scale per token"
HEAD_SIZE = 128
"""Channels of a head that ComfyUI assumes for every Wan."""

Form = tuple[dict[str, Tensor], dict[str, object], LayerRecord]
"""A layer's tensors by the ends of their names, its marker, and what became of it."""


def build(model: StoredModel, options: Options) -> Output:
    """8 bits: ``weight`` int8 [N, K], ``weight_scale`` float32 [N, 1], of the rotated original weight if it is given.

    FP8: see :func:`float8_form`; 4 bits: see :func:`rotated_int4`. Each quantized layer has a marker ``comfy_quant``
    (uint8, JSON); the header's ``_quantization_metadata`` repeats them. A layer whose width no rotation divides is
    stored as plain 8 bits. The header's ``config`` says of a causal model that it is one: by the tensors ComfyUI takes
    it for a bidirectional Wan.
    """
    refuse_asymmetric(model, "ComfyUI")
    _refuse_rounding_twice(model, options)
    tensors, markers, records = marked_file(model, ORIGINAL, options)
    metadata, notes = marked_header(markers), tuple[str, ...]()
    if model.causal(options):
        metadata["config"] = json.dumps({"transformer": {"causal_ar": True}})
        if model.head_size not in (None, HEAD_SIZE):
            notes = (
                f"ComfyUI splits every Wan into heads of {HEAD_SIZE} channels; this model's have {model.head_size}",
            )
    return Output(
        tensors={FILE: (tensors, metadata)},
        documents={},
        records=records,
        activations=_activations(model),
        notes=notes,
        static=any(layer.is_float8 for layer in model.layers.values()),
    )


def _activations(model: StoredModel) -> str:
    """What becomes of inputs; float8 without a static scale stays a weight-only form there."""
    kinds = dict.fromkeys(
        (FLOAT8_STATIC if layer.input_scale is not None else _IN_FLOAT) if layer.is_float8 else PER_TOKEN
        for layer in model.layers.values()
    )
    return " or ".join(kinds)


def marked_file(
    model: StoredModel, style: str, options: Options, blocks_only: bool = False
) -> tuple[dict[str, Tensor], dict[str, dict[str, object]], list[LayerRecord]]:
    """All tensors with a marker for each quantized layer, the markers by layer, and what became of the linears.

    With ``blocks_only`` linears outside of Wan's blocks are written in floating point.
    """
    tensors = float_tensors(model, style, options)
    records = kept_records(model, style)
    markers: dict[str, dict[str, object]] = {}
    for stored, name in layer_names(model, style):
        if blocks_only and not model.naming.in_block(stored.plan.layer):
            tensors[f"{name}.weight"], record = as_float(stored, name, options)
        else:
            own, markers[name], record = _form(stored, name)
            tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
            tensors[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(markers[name]).encode()), dtype=torch.uint8)
        if stored.bias is not None:
            tensors[f"{name}.bias"] = cast(stored.bias, options)
        records.append(record)
    return tensors, markers, records


def marked_header(markers: dict[str, dict[str, object]]) -> dict[str, str]:
    """The metadata of a file with markers."""
    return {"format": "pt", "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": markers})}


def _form(stored: StoredLayer, name: str) -> Form:
    if stored.is_float8:
        return float8_form(stored, name)
    if stored.rotation is not None and (stored.bits == 8 or stored.original is None):
        return rotated_int8(stored, name, stored.rotation)
    size = rotation_size(stored.plan.in_features)
    if size is None or stored.original is None:
        integers, scale, record = to_single(stored, name, torch.float32)
        return {"weight": integers, "weight_scale": scale}, {"format": "int8_tensorwise"}, record
    return rotated_int4(stored, stored.original, name, size) if stored.bits == 4 else rotated_int8(stored, name, size)


def float8_form(stored: StoredLayer, name: str) -> Form:
    """``weight`` float8_e4m3fn [N, K], ``weight_scale`` float32 without axes, ``input_scale`` likewise if it is static.

    Raises:
        InteropError: when inputs are rotated, which this format does not say.
    """
    if stored.rotation is not None:
        raise InteropError(
            f"layer {stored.plan.layer} is FP8 and rotated; ComfyUI rotates inputs of integers alone. Quantize with "
            "fp8 without ConvRot, or with w8a8-single-convrot"
        )
    values, scale, record = to_float8_tensor(stored, name)
    static = input_scale_of(stored)
    tensors = {"weight": values, "weight_scale": scale} | ({} if static is None else {"input_scale": static})
    return tensors, {"format": "float8_e4m3fn"}, record


def rotated_int8(stored: StoredLayer, name: str, size: int) -> Form:
    """int8 [N, K] rotated in groups of ``size`` channels, with a scale per output.

    The bundle's integers where they are rotated so and have one scale, else the original weight rotated and rounded.
    """
    single = stored.single_scale() if stored.rotation == size else None
    if single is not None:
        (integers, scale), note = single, "int4 in a byte" if stored.bits == 4 else ""
    else:
        source = stored.weight() if stored.original is None else stored.original
        integers, scale = round_per_channel(rotate(source, size))
        note = MERGED if stored.original is None else _note(size)
    marker = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
    written = stored.weight() if single is not None else rotate(integers * scale, size)
    record = record_of(stored, name, "int8 rotated", written, note)
    return {"weight": integers, "weight_scale": scale}, marker, record


def rotated_int4(stored: StoredLayer, original: Tensor, name: str, size: int) -> Form:
    """The original weight [N, K] as ``asym_w4a8_int8``.

    ``weight`` int8 [N, K / 2], ``weight_s_rel`` float8_e4m3fn [N, K / 16], ``weight_s_channel`` float32 [N] and
    ``weight_codebook`` float32 [16].
    """
    found = quantize_rotated(original, size)
    tensors = {
        "weight": found.packed(),
        "weight_s_rel": found.group_scale,
        "weight_s_channel": found.channel_scale,
        "weight_codebook": found.codebook,
    }
    marker = {"format": "asym_w4a8_int8", "group_size": GROUP, "convrot": True, "convrot_groupsize": size}
    return tensors, marker, record_of(stored, name, "int4 rotated", found.weight(), _note(size))


def _note(size: int) -> str:
    return f"the original weight, rounded after a rotation of {size} channels"


def _refuse_rounding_twice(model: StoredModel, options: Options) -> None:
    """Refuse 4-bit layers whose original weights are not there: the format's grid is not the bundle's.

    Raises:
        InteropError: naming layers and what to do.
    """
    four = [name for name, layer in model.layers.items() if layer.bits == 4 and layer.original is None]
    rotated = [name for name in four if rotation_size(model.layers[name].plan.in_features)]
    if rotated and not options.widen:
        raise InteropError(
            f"{len(rotated)} layers have 4-bit weights ({', '.join(rotated[:3])}); this target's 4-bit form rotates "
            "weights and has levels and scales of its own, onto which the bundle's integers would be rounded a second "
            "time. Give the weights that were quantized, which are rounded once (original=..., --original FILE), or "
            "allow int4 in bytes (widen=True, --widen-int4): as large as w8a8 and no better than w4a8"
        )
