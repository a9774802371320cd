"""compressed-tensors (vLLM, transformers): ``int-quantized`` or ``float-quantized``, weights per channel."""

from __future__ import annotations

from fxq.export.interop.layers import (
    ASYMMETRIC,
    FLOAT8_PER_TOKEN,
    FLOAT8_STATIC,
    PER_TOKEN,
    Options,
    Output,
    StoredModel,
    int8_file,
    layer_names,
    refuse_mixed,
)
from fxq.export.interop.names import DIFFUSERS

FILE = "model.safetensors"


def build(model: StoredModel, options: Options) -> Output:
    """``<layer>.weight`` int8 [N, K], ``<layer>.weight_scale`` [N, 1] in the dtype of the layer.

    Layers that measure zero points are a group of their own in the config, where others are not. Of FP8 bundles weights
    are float8_e4m3fn, and layers with a static input scale have ``<layer>.input_scale`` [1] and a group of their own.
    """
    floats = refuse_mixed(model, "compressed-tensors")
    tensors, records = int8_file(model, options, DIFFUSERS, "compressed-tensors", None)
    ignored = [record.name for record in records if record.form == "float"]
    groups: dict[str, list[str]] = {}
    for layer, name in layer_names(model, DIFFUSERS):
        scheme = layer.plan.quantization
        inputs = FLOAT8_PER_TOKEN if scheme.per_token else FLOAT8_STATIC
        if not floats:
            inputs = ASYMMETRIC if scheme.asymmetric else PER_TOKEN
        groups.setdefault(inputs, []).append(name)
    config = {**options.base_config, "quantization_config": _config(groups, ignored, floats)}
    documents: dict[str, object] = {"config.json": config}
    return Output(
        tensors={FILE: (tensors, {"format": "pt"})},
        documents=documents,
        records=records,
        activations=" or ".join(kind for kind in _INPUTS if kind in groups),
        static=floats,
    )


_INPUTS: dict[str, dict[str, object]] = {
    PER_TOKEN: {"symmetric": True, "strategy": "token", "dynamic": True},
    ASYMMETRIC: {"symmetric": False, "strategy": "token", "dynamic": True},
    FLOAT8_PER_TOKEN: {"symmetric": True, "strategy": "token", "dynamic": True},
    FLOAT8_STATIC: {"symmetric": True, "strategy": "tensor", "dynamic": False},
}


def _config(layers: dict[str, list[str]], ignored: list[str], floats: bool) -> dict[str, object]:
    """Of layers by what happens to their inputs; all linears that are not ignored are of the only kind."""
    numbers = {"num_bits": 8, "type": "float" if floats else "int"}
    groups = {
        f"group_{number}": {
            "targets": names if len(layers) > 1 else ["Linear"],
            "weights": {**numbers, "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {**numbers, **_INPUTS[kind]},
            "output_activations": None,
        }
        for number, (kind, names) in enumerate(layers.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if floats else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
