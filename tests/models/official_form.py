"""Writes rollouts of the in-place implementation in the form of the official dumps, for any of their settings."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fxq.models.causal_wan import CausalWan, CausalWanConfig
from tests.models.inplace import dump

ARGS = {
    "seed": 0,
    "dim": 48,
    "heads": 2,
    "ffn_dim": 72,
    "layers": 2,
    "freq_dim": 16,
    "text_dim": 20,
    "text_len": 5,
    "channels": 4,
    "height": 4,
    "width": 6,
    "batch": 1,
    "frames_per_chunk": 3,
    "chunks": 3,
    "initial_chunks": 0,
    "steps": [1000, 750, 500, 250],
    "first_chunk_steps": None,
    "no_warp": False,
    "shift": 5.0,
    "context_noise": 0,
    "local_attn_size": -1,
    "sink_size": 0,
    "dtype": "float32",
    "threads": 1,
}
"""Settings under the names of the official tool."""

SETTINGS = {
    "wide": {"dim": 96, "heads": 3, "ffn_dim": 200, "layers": 3, "freq_dim": 32},
    "window": {"local_attn_size": 6, "chunks": 4},
    "window_sink": {"local_attn_size": 9, "sink_size": 3, "chunks": 5},
    "window_large_sink": {"local_attn_size": 4, "sink_size": 3, "chunks": 4},
    "framewise": {"frames_per_chunk": 1, "chunks": 5, "steps": [1000, 500], "first_chunk_steps": [1000, 750, 500, 250]},
    "framewise_one_step": {"frames_per_chunk": 1, "chunks": 5, "steps": [1000], "first_chunk_steps": [1000, 750, 250]},
    "framewise_window": {"frames_per_chunk": 1, "chunks": 7, "local_attn_size": 4, "sink_size": 1},
    "initial": {"initial_chunks": 1},
    "image_to_video": {"frames_per_chunk": 1, "initial_chunks": 1, "chunks": 4, "batch": 2},
    "batch_2": {"batch": 2, "height": 6},
    "unwarped": {"no_warp": True, "steps": [1000, 757, 522], "shift": 8.0},
    "context_noise": {"context_noise": 40, "shift": 3.0},
    "float64": {"dtype": "float64"},
    "bfloat16": {"dtype": "bfloat16", "local_attn_size": 6, "chunks": 4},
}
"""Changes to :data:`ARGS` by the name of the file."""


def write(path, **changes):
    """Dump a rollout with settings :data:`ARGS` changed by ``changes``."""
    args = ARGS | changes
    if unknown := changes.keys() - ARGS.keys():
        raise KeyError(f"{sorted(unknown)}: expected some of {sorted(ARGS)}")
    torch.manual_seed(args["seed"])
    config = CausalWanConfig(
        dim=args["dim"],
        ffn_dim=args["ffn_dim"],
        num_heads=args["heads"],
        num_layers=args["layers"],
        freq_dim=args["freq_dim"],
        text_dim=args["text_dim"],
        text_len=args["text_len"],
        in_dim=args["channels"],
        out_dim=args["channels"],
    )
    model = CausalWan(config).to(getattr(torch, args["dtype"])).eval().requires_grad_(False)
    dump(path, model, args=args | {"text_tokens": args["text_len"]}, seed=args["seed"])
    tensors, metadata = read(path)
    metadata |= {"args": json.dumps(args), "versions": json.dumps({"torch": torch.__version__})}
    save_file(tensors | _renoised(tensors, json.loads(metadata["calls"])), path, metadata=metadata)


def _renoised(tensors, calls):
    """Result and timestep of every renoising: the input of the next denoising call."""
    later = [i for i, call in enumerate(calls) if call["kind"] == "denoise" and call["step"]]
    found = {}
    for number, i in enumerate(later):
        found[f"renoise.{number:03d}.out"] = tensors[f"call.{i:03d}.x"].flatten(0, 1).clone()
        found[f"renoise.{number:03d}.t"] = tensors[f"call.{i:03d}.t"].flatten().clone()
    return found


def read(path):
    """Tensors and metadata of a file, read whole so that it can be written again."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def rewrite(path, change):
    """Change the tensors and the parsed metadata of a file in place."""
    tensors, metadata = read(path)
    parsed = {name: json.loads(text) for name, text in metadata.items()}
    change(tensors, parsed)
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in parsed.items()})
