"""Stored size of quantized linears at the width of a real model: one block of Wan 1.3B with random weights.

python benchmarks/sizes.py
"""

from __future__ import annotations

import torch

import fxq
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout
from fxq.passes.methods.ranges import MinMax
from fxq.presets import wan_recipe


def main() -> None:
    """Quantize and print bytes over bf16 bytes, scales and permutations included."""
    torch.manual_seed(0)
    model = CausalWan(CausalWanConfig(num_layers=1, text_len=16)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "blocks" in name:
            parameter.data[:, ::48] *= 4  # 32 outlier channels, so that dual scale has to be stored
    draws = fxq.Draws([0], (6, 16, 4, 4))
    rollout = SelfForcingRollout(model, [({"prompt_embeds": torch.randn(1, 16, 4096)}, draws)], SamplerConfig())
    for bits in (8, 4):
        recipe = wan_recipe(f"w{bits}a8", fxq.Scheme(weight_bits=bits), (MinMax(),), weighting="uniform")
        result = fxq.summary(fxq.quantize(model, rollout, recipe, progress=False))
        dual = sum(row.outliers > 0 for row in result.quantized)
        print(f"W{bits}A8: {result.ratio:.4f}x of bf16, {len(result.quantized)} linears, {dual} with two scales")


if __name__ == "__main__":
    main()
