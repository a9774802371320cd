"""diffusers with torchao: what ``from_pretrained`` of a diffusers model reads as ``Int8Tensor`` or ``Float8Tensor``."""

from __future__ import annotations

import json

import torch

from fxq.dtypes import dtype_name
from fxq.export.interop.layers import (
    FLOAT8_PER_TOKEN,
    PER_TOKEN,
    Options,
    Output,
    StoredModel,
    cast,
    float_tensors,
    kept_records,
    layer_names,
    refuse_asymmetric,
    refuse_int4,
    refuse_mixed,
    to_single,
)
from fxq.export.interop.names import DIFFUSERS

FILE = "diffusion_pytorch_model.safetensors"
_SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}
_E4M3 = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}
_PRODUCT = {
    "_type": "Float8MMConfig",
    "_data": {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False},
}
_ANY_KERNEL = {"_type": "KernelPreference", "_data": "AUTO"}
_PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}}


def build(model: StoredModel, options: Options) -> Output:
    """``<layer>._weight_qdata`` int8 [N, K], ``_weight_scale`` float32 [N, 1], ``_weight_zero_point`` int8 [N, 1].

    Of FP8 bundles ``_weight_qdata`` is float8_e4m3fn and there is no zero point; inputs are scaled per token there.

    The file's metadata says per tensor what to build of it. Without ``base_config`` the ``config.json`` holds the
    ``quantization_config`` only and is to be merged with the model's own.
    """
    refuse_int4(model, "torchao in diffusers", options)
    refuse_asymmetric(model, "torchao in diffusers")
    floats = refuse_mixed(model, "torchao in diffusers")
    tensors = float_tensors(model, DIFFUSERS, options)
    records = kept_records(model, DIFFUSERS)
    kept = [record.name for record in records]
    weights: dict[str, str] = {}
    for stored, name in layer_names(model, DIFFUSERS):
        integers, scale, record = to_single(stored, name, torch.float32)
        tensors[f"{name}._weight_qdata"], tensors[f"{name}._weight_scale"] = integers, scale
        if not floats:
            tensors[f"{name}._weight_zero_point"] = torch.zeros(scale.shape, dtype=torch.int8)
        dtype = options.float_dtype or stored.dtype
        described = (_float8_tensor if floats else _int8_tensor)(integers.shape[1], dtype)
        weights[f"{name}.weight"] = json.dumps(described)
        if stored.bias is not None:
            tensors[f"{name}.bias"] = cast(stored.bias, options)
        records.append(record)
    plain = {name: json.dumps({"_type": "Tensor"}) for name in tensors if "._weight_" not in name}
    names = sorted({**weights, **plain})
    metadata = {"format": "pt", **weights, **plain, "tensor_names": json.dumps(names)}
    config = {**options.base_config, "quantization_config": _config(kept, _FLOAT8_CONFIG if floats else _INT8_CONFIG)}
    return Output(
        tensors={FILE: (tensors, metadata)},
        documents={"config.json": config},
        records=records,
        activations=FLOAT8_PER_TOKEN if floats else PER_TOKEN,
    )


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


def _float8_tensor(width: int, dtype: torch.dtype) -> dict[str, object]:
    inputs = {
        "float8_dtype": _E4M3,
        "granularity": _PER_ROW,
        "mm_config": _PRODUCT,
        "hp_value_lb": None,
        "hp_value_ub": None,
        "kernel_preference": _ANY_KERNEL,
    }
    return {
        "_type": "Float8Tensor",
        "_data": {
            "block_size": [1, width],
            "mm_config": _PRODUCT,
            "act_quant_kwargs": {"_type": "QuantizeTensorToFloat8Kwargs", "_data": inputs},
            "kernel_preference": _ANY_KERNEL,
            "dtype": {"_type": "torch.dtype", "_data": dtype_name(dtype)},
        },
        "_tensor_data_names": ["qdata", "scale"],
    }


_INT8_CONFIG: dict[str, object] = {
    "_type": "Int8DynamicActivationInt8WeightConfig",
    "_version": 2,
    "_data": {
        "act_mapping_type": _SYMMETRIC,
        "weight_only_decode": False,
        "granularity": {**_PER_ROW, "_version": 1},
        "set_inductor_config": True,
    },
}
_FLOAT8_CONFIG: dict[str, object] = {
    "_type": "Float8DynamicActivationFloat8WeightConfig",
    "_version": 2,
    "_data": {
        "activation_dtype": _E4M3,
        "weight_dtype": _E4M3,
        "granularity": [{**_PER_ROW, "_version": 1}, {**_PER_ROW, "_version": 1}],
        "mm_config": {**_PRODUCT, "_version": 1},
        "kernel_preference": _ANY_KERNEL,
        "set_inductor_config": True,
    },
}


def _config(kept: list[str], config: dict[str, object]) -> dict[str, object]:
    return {
        "quant_method": "torchao",
        "quant_type": {"default": config},
        "quant_type_kwargs": {},
        "modules_to_not_convert": kept,
    }
