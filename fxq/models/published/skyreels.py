"""SkyReels-V2 diffusion forcing: Wan with an embedding of the frame rate that is added to the block modulation."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

FAST = 1
"""Row of the embedding for 24 frames a second, at which the models are published; row 0 is for 16."""
_OWN = (
    "fps_embedding.weight",
    "fps_projection.0.weight",
    "fps_projection.0.bias",
    "fps_projection.2.weight",
    "fps_projection.2.bias",
)
_BIAS = "time_projection.1.bias"


def fits(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has the frame-rate embedding."""
    return _BIAS in tensors and all(name in tensors for name in _OWN)


def adapt(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a Wan that computes the same at 24 frames a second.

    The embedding adds one vector to ``time_projection``, whatever the time: it becomes a part of its bias.
    """
    embedding, up, up_bias, down, down_bias = (tensors[name].float() for name in _OWN)
    added = F.linear(F.silu(F.linear(embedding[FAST], up, up_bias)), down, down_bias)
    found = {name: tensor for name, tensor in tensors.items() if name not in _OWN}
    found[_BIAS] = (tensors[_BIAS].float() + added).to(tensors[_BIAS].dtype)
    return found
