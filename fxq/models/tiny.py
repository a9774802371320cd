"""The tiny autoregressive video model that ships with fxq: a trained :class:`CausalWan`.

It generates the sprite videos of :mod:`fxq.metrics.sprites` in pixel space, 7 chunks of 3 frames, 4 steps and
a context call per chunk. ``examples/tiny_arvd/train.py`` trains it.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

from safetensors import safe_open
from safetensors.torch import save_file

from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.schedule import FlowSchedule
from fxq.models.self_forcing import SamplerConfig

CHUNK, CHUNKS = 3, 7
TINY = CausalWanConfig(
    dim=96,
    ffn_dim=384,
    num_heads=3,
    num_layers=4,
    freq_dim=64,
    text_dim=32,
    text_len=7,
    in_dim=3,
    out_dim=3,
    patch_size=(1, 4, 4),
)
TINY_SAMPLER = SamplerConfig(frames_per_chunk=CHUNK, schedule=FlowSchedule(prediction="x0"))
WEIGHTS = pathlib.Path(__file__).parent / "tiny_arvd.safetensors"


def save_tiny(path: pathlib.Path, model: CausalWan, metadata: Mapping[str, str]) -> None:
    """Write weights and facts of a training run."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt", **metadata})


def load_tiny(path: pathlib.Path | None = None) -> CausalWan:
    """The shipped model in float32, in eval mode; ``path`` names other weights of the same shape."""
    path = path or WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; train it with examples/tiny_arvd/train.py or reinstall fxq")
    model = CausalWan(TINY)
    with safe_open(path, "pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return model.eval().requires_grad_(False)


def tiny_facts(path: pathlib.Path | None = None) -> dict[str, object]:
    """Training steps and scores stored in the weights file."""
    with safe_open(path or WEIGHTS, "pt") as file:
        metadata = file.metadata() or {}
    return {"steps": int(metadata.get("steps", 0)), "scores": json.loads(metadata.get("scores", "{}"))}
