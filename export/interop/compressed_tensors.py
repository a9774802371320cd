"""compressed-tensors (vLLM, transformers): format ``int-quantized``, weights per channel, inputs per token."""

from __future__ import annotations

from fxq.export.interop.layers import Options, Output, StoredModel, int8_file
from fxq.export.interop.names import DIFFUSERS

FILE = "model.safetensors"


def build(model: StoredModel, options: Options) -> Output:
    """``<layer>.weight`` int8 [N, K], ``<layer>.weight_scale`` [N, 1] in the dtype of the layer."""
    tensors, records = int8_file(model, options, DIFFUSERS, "compressed-tensors", None)
    ignored = [record.name for record in records if record.form == "float"]
    config = {**options.base_config, "quantization_config": _config(ignored)}
    return Output(tensors={FILE: (tensors, {"format": "pt"})}, documents={"config.json": config}, records=records)


def _config(ignored: list[str]) -> dict[str, object]:
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**integers, "strategy": "channel", "dynamic": False},
        "input_activations": {**integers, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
