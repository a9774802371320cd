"""vLLM-Omni: int8 linears under the names of diffusers, for the folder ``transformer`` of a model."""

from __future__ import annotations

import torch

from fxq.export.interop.layers import Options, Output, StoredModel, int8_file, refuse_asymmetric
from fxq.export.interop.names import DIFFUSERS

FILE = "diffusion_pytorch_model.safetensors"


def build(model: StoredModel, options: Options) -> Output:
    """``<layer>.weight`` int8 [N, K], ``<layer>.weight_scale`` float32 [N, 1]; the config says ``int8``."""
    refuse_asymmetric(model, "vLLM-Omni")
    tensors, records = int8_file(model, options, DIFFUSERS, "vLLM-Omni", torch.float32)
    ignored = [record.name for record in records if record.form == "float"]
    method = {"quant_method": "int8", "activation_scheme": "dynamic", "ignored_layers": ignored}
    config = {**options.base_config, "quantization_config": method}
    return Output(tensors={FILE: (tensors, {"format": "pt"})}, documents={"config.json": config}, records=records)
