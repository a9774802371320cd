"""Quantize a diffusers folder into a folder that its class loads with ``from_pretrained``.

python examples/diffusers_folder.py [SOURCE [OUT]]

SOURCE is a folder written by ``save_pretrained``, of a Wan transformer or of a pipeline with one; without it a small
model with random weights is written first. Loading the result takes accelerate, as every quantized model in diffusers
does; without it the folder is written only.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import tempfile
import warnings

import torch

import fxq

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def call(model: torch.nn.Module, seed: int) -> dict[str, object]:
    """Arguments of one denoiser call: latents [B, C, F, H, W], a timestep, text [B, L, text_dim]."""
    generator, config = torch.Generator().manual_seed(seed), model.config

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    return {
        "hidden_states": normal(1, config.in_channels, 3, 8, 8),
        "timestep": torch.randint(0, 1000, (1,), generator=generator),
        "encoder_hidden_states": normal(1, 7, config.text_dim),
        "return_dict": False,
    }


def main(arguments: list[str]) -> None:
    """Read, quantize, write, and read the result with diffusers."""
    try:
        import diffusers
    except ImportError:
        sys.exit("this example needs diffusers: pip install diffusers")
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        source = pathlib.Path(arguments[0] if arguments else f"{place}/original")
        out = arguments[1] if len(arguments) > 1 else f"{place}/quantized"
        if not arguments:
            torch.manual_seed(0)
            diffusers.WanTransformer3DModel(**CONFIG).save_pretrained(source)
        model = fxq.load_folder(source)
        quantized = fxq.quantize(model, [call(model, seed) for seed in range(4)], "w8a8", progress=False)
        print(fxq.summary(quantized))
        folder = fxq.save_diffusers(quantized, model, out)
        print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
        (want,), (integers,) = model(**call(model, 100)), quantized(**call(model, 100))
        print(f"relative error of the quantized graph {((integers - want).norm() / want.norm()).item():.5f}")
        if importlib.util.find_spec("accelerate") is None:
            print("diffusers needs accelerate to load it: pip install accelerate")
            return
        fxq.register()
        (again,) = type(model).from_pretrained(folder)(**call(model, 100))
        print(f"the folder read by from_pretrained differs from it by {(again - integers).abs().max().item():.5f}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="diffusers")
    main(sys.argv[1:])
