"""compressed-tensors (vLLM, transformers): format ``int-quantized``, weights per channel, inputs per token."""

from __future__ import annotations

from fxq.export.interop.layers import ASYMMETRIC, PER_TOKEN, Options, Output, StoredModel, int8_file, layer_names
from fxq.export.interop.names import DIFFUSERS

FILE = "model.safetensors"


def build(model: StoredModel, options: Options) -> Output:
    """``<layer>.weight`` int8 [N, K], ``<layer>.weight_scale`` [N, 1] in the dtype of the layer.

    Layers that measure zero points are a group of their own in the config, where others are not.
    """
    tensors, records = int8_file(model, options, DIFFUSERS, "compressed-tensors", None)
    ignored = [record.name for record in records if record.form == "float"]
    names: dict[bool, list[str]] = {}
    for layer, name in layer_names(model, DIFFUSERS):
        names.setdefault(not layer.plan.quantization.asymmetric, []).append(name)
    config = {**options.base_config, "quantization_config": _config(names, ignored)}
    documents: dict[str, object] = {"config.json": config}
    activations = " or ".join(PER_TOKEN if symmetric else ASYMMETRIC for symmetric in sorted(names, reverse=True))
    return Output(
        tensors={FILE: (tensors, {"format": "pt"})}, documents=documents, records=records, activations=activations
    )


def _config(names: dict[bool, list[str]], ignored: list[str]) -> dict[str, object]:
    """Of layers by whether their inputs are symmetric; all linears that are not ignored are of the only kind."""
    integers = {"num_bits": 8, "type": "int"}
    groups = {
        f"group_{number}": {
            "targets": layers if len(names) > 1 else ["Linear"],
            "weights": {**integers, "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {**integers, "symmetric": symmetric, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
        for number, (symmetric, layers) in enumerate(names.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
