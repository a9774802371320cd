"""Most memory of a rollout on a GPU, beside what the planner says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxq.models.self_forcing import SelfForcingRollout
from fxq.planning.memory import CACHE_FORMATS, activation_bytes, cache_bytes, meta_model, text_bytes, weight_bytes
from fxq.planning.workloads import Workload

SHARE = 0.55
"""Of the weights in bfloat16, that W8A8 may need."""


def allowed_bytes(rollout: SelfForcingRollout) -> int:
    """:data:`SHARE` of the weights in bfloat16, and the planner's cache, text and activations of the longest call."""
    draws, sampler, config = rollout.batches[0][1], rollout.sampler, rollout.model.config
    frames, _, height, width = draws.shape
    work = Workload(
        name="rollout",
        config=config,
        latent=(height, width),
        frames_per_chunk=sampler.frames_per_chunk,
        steps=len(sampler.steps),
    )
    weights = SHARE * weight_bytes(meta_model(config))
    cache = cache_bytes(work, frames, -1, CACHE_FORMATS[0]) + text_bytes(config)
    return int(weights) + cache + activation_bytes(work, frames, -1)


def memory_facts(module: nn.Module, call: Callable[[], Any], rollout: SelfForcingRollout) -> dict[str, int]:
    """``peak_bytes`` of the module's weights and what a call makes, and ``allowed_bytes``; nothing on a CPU.

    What lies on the GPU besides, such as the model in bfloat16, is not counted.
    """
    weights = [*module.parameters(), *module.buffers()]
    if not weights[0].is_cuda:
        return {}
    own = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights}.values())
    call()  # libraries take their workspaces
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - own
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - others
    return {"peak_bytes": peak, "allowed_bytes": allowed_bytes(rollout)}
