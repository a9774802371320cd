"""vLLM-Omni: int8 linears under the names of diffusers, for the folder ``transformer`` of a model."""

from __future__ import annotations

import torch

from fxq.export.interop.layers import (
    Options,
    Output,
    StoredModel,
    cast,
    float_tensors,
    kept_records,
    layer_names,
    refuse_int4,
    to_int8,
)
from fxq.export.interop.names import DIFFUSERS

FILE = "diffusion_pytorch_model.safetensors"


def build(model: StoredModel, options: Options) -> Output:
    """``<layer>.weight`` int8 [N, K], ``<layer>.weight_scale`` float32 [N, 1]; the config says ``int8``."""
    refuse_int4(model, "vLLM-Omni", options)
    tensors = float_tensors(model, DIFFUSERS, options)
    records = kept_records(model, DIFFUSERS)
    ignored = [record.name for record in records]
    for stored, name in layer_names(model, DIFFUSERS):
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], record = to_int8(stored, name, torch.float32)
        if stored.bias is not None:
            tensors[f"{name}.bias"] = cast(stored.bias, options)
        records.append(record)
    method = {"quant_method": "int8", "activation_scheme": "dynamic", "ignored_layers": ignored}
    config = {**options.base_config, "quantization_config": method}
    return Output(tensors={FILE: (tensors, {"format": "pt"})}, documents={"config.json": config}, records=records)
