"""vLLM-Omni: int8 or fp8 linears of blocks under the names of diffusers, for the folder ``transformer`` of a model."""

from __future__ import annotations

import re

from fxq.export.interop.blocks import block_file
from fxq.export.interop.layers import (
    FLOAT8_PER_TOKEN,
    FLOAT8_STATIC,
    PER_TOKEN,
    InteropError,
    LayerRecord,
    Options,
    Output,
    StoredModel,
    refuse_mixed,
)
from fxq.export.interop.names import DIFFUSERS

FILE = "diffusion_pytorch_model.safetensors"
_MODULES = ((".ffn.net.0.", ".ffn.net_0."), (".ffn.net.2", ".ffn.net_2"), (".to_out.0", ".to_out"))
"""Names of diffusers and of the modules that vLLM-Omni 0.30 builds for them."""
_FUSED = re.compile(r"(.*\.attn1)\.to_([qkv])")
_CAUSAL = (
    "vLLM-Omni 0.30 has no loop for causal Wan: it denoises all frames at once, without the cache that this model was "
    "trained with"
)


def build(model: StoredModel, options: Options) -> Output:
    """``<layer>.weight`` int8 [N, K], ``<layer>.weight_scale`` float32 [N, 1] for the linears of the blocks.

    Of FP8 bundles ``weight`` is float8_e4m3fn and ``weight_scale`` has no axes: the runtime's fp8 has one scale per
    tensor. With static input scales each has an ``input_scale`` of that form, and the config says so.

    The config says ``int8``, that the file holds integers, and by the runtime's own names which linears it does not.
    The text embedding is a plain linear there and is written in floating point.

    Raises:
        InteropError: when one or two of q, k and v of a self-attention are kept, which the runtime has as one linear;
            when some FP8 layers have static input scales and others have not.
    """
    floats = refuse_mixed(model, "vLLM-Omni")
    static = floats and _static(model)
    tensors, records = block_file(model, options, DIFFUSERS, "vLLM-Omni", per_tensor=True)
    method = {
        "quant_method": "fp8" if floats else "int8",
        **({} if floats else {"is_checkpoint_int8_serialized": True}),
        "activation_scheme": "static" if static else "dynamic",
        "ignored_layers": _ignored(records),
    }
    config = {**options.base_config, "quantization_config": method}
    return Output(
        tensors={FILE: (tensors, {"format": "pt"})},
        documents={"config.json": config},
        records=records,
        activations=(FLOAT8_STATIC if static else FLOAT8_PER_TOKEN) if floats else PER_TOKEN,
        notes=(_CAUSAL,) if model.causal(options) else (),
        static=static,
    )


def _static(model: StoredModel) -> bool:
    """Whether the layers of the blocks have static input scales."""
    layers = {name: layer for name, layer in model.layers.items() if model.naming.in_block(name)}
    kinds = {layer.input_scale is not None: name for name, layer in layers.items()}
    if len(kinds) > 1:
        raise InteropError(
            f"{kinds[True]} has a static input scale and {kinds[False]} has one per token; vLLM-Omni does one of the "
            "two for all layers. Quantize all with fp8 or with fp8-dynamic"
        )
    return True in kinds


def _ignored(records: list[LayerRecord]) -> list[str]:
    """Names of the float linears as the runtime has them; it compares whole names."""
    names, fused = list[str](), dict[str, list[str]]()
    for record in records:
        if record.form != "float":
            continue
        names.append(_module(record.name))
        if found := _FUSED.fullmatch(record.name):
            fused.setdefault(found[1], []).append(found[2])
    if partly := [f"{name}: {', '.join(parts)}" for name, parts in fused.items() if len(parts) < 3]:
        raise InteropError(
            f"vLLM-Omni multiplies q, k and v of a self-attention as one linear, and the recipe keeps a part of them "
            f"in {len(partly)} ({'; '.join(partly[:3])}): keep all three by a rule, or quantize all three"
        )
    return [*names, *(f"{name}.to_qkv" for name in fused)]


def _module(name: str) -> str:
    for old, new in _MODULES:
        if old in name or name.endswith(old):
            return name.replace(old, new)
    return name
