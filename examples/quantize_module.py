"""Quantize any torch module with a plain loader: no rollout, no video model.

python examples/quantize_module.py
"""

from __future__ import annotations

import tempfile

import torch
from torch import nn

import fxq


def main() -> None:
    """Quantize a small MLP to W8A8, print what happened to every linear, save, load, compare."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 512), nn.GELU(approximate="tanh"), nn.Linear(512, 128)).eval()
    batches = [torch.randn(64, 128) for _ in range(8)]
    quantized = fxq.quantize(model, batches, "w8a8")
    print(fxq.summary(quantized))
    x = torch.randn(64, 128)
    with torch.no_grad():
        error = (quantized(x) - model(x)).norm() / model(x).norm()
    print(f"relative output error {error:.4f}")
    with tempfile.TemporaryDirectory() as folder:
        fxq.save(quantized, f"{folder}/mlp")
        again = fxq.load(f"{folder}/mlp")
    print(f"reloaded output identical: {torch.equal(again(x), quantized(x))}")


if __name__ == "__main__":
    main()
