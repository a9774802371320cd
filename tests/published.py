"""A small checkpoint in the published form, as the command line takes it."""

import json

import torch
from safetensors.torch import save_file

from fxq.models.causal_wan import CausalWan, CausalWanConfig

SETTINGS = {
    "dim": 64, "ffn_dim": 96, "num_heads": 2, "num_layers": 1, "freq_dim": 16, "text_dim": 20, "text_len": 5,
    "in_dim": 4, "out_dim": 4,
}  # fmt: skip


def options(folder, prompts=3, **settings):
    """Writes model, sizes and prompts into a folder; the options that name them, for videos of two chunks."""
    settings = SETTINGS | settings
    torch.manual_seed(0)
    torch.save(CausalWan(CausalWanConfig(**settings)).state_dict(), folder / "model.pt")
    save_file({"prompts": torch.randn(prompts, 5, settings["text_dim"])}, folder / "prompts.safetensors")
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "t2v"}))
    files = ["--checkpoint", str(folder / "model.pt"), "--prompts", str(folder / "prompts.safetensors")]
    return ["--model", "causal-wan", *files, "--frames", "6", "--height", "4", "--width", "6", "--device", "cpu"]
