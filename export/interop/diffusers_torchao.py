"""diffusers with torchao: what ``from_pretrained`` of a diffusers model reads as ``Int8Tensor`` weights."""

from __future__ import annotations

import json

import torch

from fxq.dtypes import dtype_name
from fxq.export.interop.layers import (
    Options,
    Output,
    StoredModel,
    cast,
    float_tensors,
    kept_records,
    layer_names,
    refuse_asymmetric,
    refuse_int4,
    to_int8,
)
from fxq.export.interop.names import DIFFUSERS

FILE = "diffusion_pytorch_model.safetensors"
_SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}
_PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}}


def build(model: StoredModel, options: Options) -> Output:
    """``<layer>._weight_qdata`` int8 [N, K], ``_weight_scale`` float32 [N, 1], ``_weight_zero_point`` int8 [N, 1].

    The file's metadata says per tensor what to build of it. Without ``base_config`` the ``config.json`` holds the
    ``quantization_config`` only and is to be merged with the model's own.
    """
    refuse_int4(model, "torchao in diffusers", options)
    refuse_asymmetric(model, "torchao in diffusers")
    tensors = float_tensors(model, DIFFUSERS, options)
    records = kept_records(model, DIFFUSERS)
    kept = [record.name for record in records]
    weights: dict[str, str] = {}
    for stored, name in layer_names(model, DIFFUSERS):
        integers, scale, record = to_int8(stored, name, torch.float32)
        tensors[f"{name}._weight_qdata"], tensors[f"{name}._weight_scale"] = integers, scale
        tensors[f"{name}._weight_zero_point"] = torch.zeros(scale.shape, dtype=torch.int8)
        dtype = options.float_dtype or stored.dtype
        weights[f"{name}.weight"] = json.dumps(_int8_tensor(integers.shape[1], dtype))
        if stored.bias is not None:
            tensors[f"{name}.bias"] = cast(stored.bias, options)
        records.append(record)
    plain = {name: json.dumps({"_type": "Tensor"}) for name in tensors if "._weight_" not in name}
    names = sorted({**weights, **plain})
    metadata = {"format": "pt", **weights, **plain, "tensor_names": json.dumps(names)}
    config = {**options.base_config, "quantization_config": _config(kept)}
    return Output(tensors={FILE: (tensors, metadata)}, documents={"config.json": config}, records=records)


def _int8_tensor(width: int, dtype: torch.dtype) -> dict[str, object]:
    inputs = {"granularity": _PER_ROW, "mapping_type": _SYMMETRIC, "reduce_range": False}
    return {
        "_type": "Int8Tensor",
        "_data": {
            "act_quant_kwargs": {"_type": "QuantizeTensorToInt8Kwargs", "_data": inputs},
            "reduce_range": False,
            "block_size": [1, width],
            "dtype": {"_type": "torch.dtype", "_data": dtype_name(dtype)},
        },
        "_tensor_data_names": ["zero_point", "qdata", "scale"],
    }


def _config(kept: list[str]) -> dict[str, object]:
    config = {
        "_type": "Int8DynamicActivationInt8WeightConfig",
        "_version": 2,
        "_data": {
            "act_mapping_type": _SYMMETRIC,
            "weight_only_decode": False,
            "granularity": {**_PER_ROW, "_version": 1},
            "set_inductor_config": True,
        },
    }
    return {
        "quant_method": "torchao",
        "quant_type": {"default": config},
        "quant_type_kwargs": {},
        "modules_to_not_convert": kept,
    }
