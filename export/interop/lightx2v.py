"""LightX2V: int8 or fp8 linears of blocks under Wan's original names, in one file or one per block; a run config."""

from __future__ import annotations

import re

from torch import Tensor

from fxq.export.interop.blocks import block_file
from fxq.export.interop.layers import (
    FLOAT8_PER_TOKEN,
    PER_TOKEN,
    NamedTensors,
    Options,
    Output,
    StoredModel,
    refuse_mixed,
)
from fxq.export.interop.names import ORIGINAL

FILE = "model.safetensors"
PREFIX = "model."
"""Before the names of a causal model: LightX2V's causal runner cuts six characters off each key that it reads."""
SCHEME = "int8-vllm"
"""The kernels to name; ``int8-sgl`` and ``int8-q8f`` read the same tensors, ``int8-triton`` cuts activations off."""
FLOAT8_SCHEME = "fp8-vllm"
"""Those of float8; ``fp8-sgl`` reads the same tensors."""
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_PLACE = "dit_quantized_ckpt is opened from the folder LightX2V runs in: write the full path of {} there"
_KERNELS = ". Kernels of int8-sgl and int8-q8f read the same tensors; int8-triton cuts activations off, unrounded"


def build(model: StoredModel, options: Options) -> Output:
    """``<layer>.weight`` int8, or float8_e4m3fn, [N, K] and ``<layer>.weight_scale`` float32 [N, 1].

    The runtime reads integers for all linears of the blocks and for no other: a linear that the recipe kept there is
    rounded here, one that it quantized elsewhere (the text embedding) is written in floating point. A causal model's
    names begin with ``model.``. With ``per_block`` the tensors lie in ``block_0.safetensors`` and so on and
    ``non_block.safetensors``, for ``lazy_load``; those of blocks are read by their own names, causal or not.
    """
    floats = refuse_mixed(model, "LightX2V")
    tensors, records = block_file(model, options, ORIGINAL, "LightX2V", round_kept=True)
    prefix = PREFIX if model.causal(options) else ""
    config: dict[str, object] = {
        "dit_quantized": True,
        "dit_quant_scheme": FLOAT8_SCHEME if floats else SCHEME,
        "dit_quantized_ckpt": FILE,
    }
    files = _per_block(tensors, prefix) if options.per_block else {FILE: _with_prefix(tensors, prefix)}
    if options.per_block:
        config |= {"dit_quantized_ckpt": ".", "cpu_offload": True, "lazy_load": True}
    return Output(
        tensors={name: (content, {"format": "pt"}) for name, content in files.items()},
        documents={"lightx2v.json": config},
        records=records,
        activations=FLOAT8_PER_TOKEN if floats else PER_TOKEN,
        notes=(_PLACE.format("this folder" if options.per_block else FILE) + ("" if floats else _KERNELS),),
    )


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _per_block(tensors: dict[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.match(name)
        file = f"block_{block[1]}.safetensors" if block else "non_block.safetensors"
        files.setdefault(file, NamedTensors())[name if block else prefix + name] = tensor
    return files
