"""Quantize the Wan transformer of diffusers and run it inside its own class.

python examples/diffusers_wan.py

A small ``WanTransformer3DModel`` with random weights stands for a downloaded one. It is calibrated on plain calls, then
runs in three ways: as the quantized graph, as the diffusers module with its linears swapped (``fxq.apply``), and with
its blocks compiled by the fxq backend. The module with swapped linears goes into a pipeline like any other.
"""

from __future__ import annotations

import sys
import tempfile
import warnings

import torch
from torch import Tensor

import fxq
from fxq.integrations.binding import bind
from fxq.integrations.swap import apply
from fxq.integrations.torch_compile import fxq_backend

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def call(seed: int) -> dict[str, object]:
    """Arguments of one denoiser call: latents [B, C, F, H, W], a timestep, text [B, L, 32]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 4, 3, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (2,), generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
        "return_dict": False,
    }


def main() -> None:
    """Quantize, save, and run the same call in three ways."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError:
        sys.exit("this example needs diffusers: pip install diffusers")
    torch.manual_seed(0)
    model = WanTransformer3DModel(**CONFIG).eval().requires_grad_(False)
    quantized = fxq.quantize(model, [call(seed) for seed in range(4)], "w8a8", progress=False)
    print(fxq.summary(quantized))

    example = call(100)

    def error(want: Tensor, got: Tensor) -> float:
        return ((got - want).norm() / want.norm()).item()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bundle = fxq.save(quantized, f"{folder}/wan")
        (integers,) = quantized(**example)
        (floats,) = model(**example)
        (swapped,) = apply(model, bundle)(**example)
        options = {"fxq.recipe": bind(model, bundle)}
        for part in (model.condition_embedder, *model.blocks):
            part.compile(backend=fxq_backend, options=options)  # after `pip install`, backend="fxq" is the same
        (compiled,) = model(**example)
    print(f"relative error of the quantized graph {error(floats, integers):.5f}")
    print(f"swapped linears differ from it by {error(integers, swapped):.5f}")
    print(f"the compiled model differs from it by {error(integers, compiled):.5f}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="diffusers")
    main()
