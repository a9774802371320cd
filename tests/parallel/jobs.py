"""What the ranks of the tests run; importable by name, so that it can be sent to them."""

import torch
import torch.distributed as dist

import fxq
from fxq.parallel import CAUSAL_WAN, DIFFUSERS_WAN, load_shard, local_rollout, tensor_parallel, ulysses
from tests.parallel.models import diffusers_call, wan


def video(rollout, module):
    """Latents of the first batch, and a digest of the caches after it."""
    with rollout.using(module):
        state = rollout.begin(*rollout.batches[0])
        for _ in range(rollout.units(*rollout.batches[0])):
            state = rollout.advance(state)
    return {"latents": state.latents, "keys": state.cache.prefix()[0], "values": state.cache.prefix()[1]}


def from_bundle(folder, optimized):
    """A rollout of the tensor-parallel bundle."""
    rank, size = dist.get_rank(), dist.get_world_size()
    module = load_shard(folder, CAUSAL_WAN, rank, size)
    return video(local_rollout(wan(), size), fxq.optimize(module) if optimized else module)


def from_memory(folder):
    """The same of the whole module."""
    return video(local_rollout(wan(), dist.get_world_size()), tensor_parallel(fxq.load(folder), CAUSAL_WAN))


def by_tokens(folder):
    """The model's own class with quantized linears, tokens over ranks."""
    rollout = wan()
    module = ulysses(fxq.apply(rollout.model, folder))
    return video(local_rollout(rollout, dist.get_world_size()), module)


def in_floats():
    """The float model, tokens over ranks."""
    rollout = wan()
    return video(local_rollout(rollout, dist.get_world_size()), ulysses(rollout.model))


def diffusers_from_bundle(folder, dtype):
    """A call of the tensor-parallel bundle of diffusers' transformer."""
    module = load_shard(folder, DIFFUSERS_WAN, dist.get_rank(), dist.get_world_size())
    with torch.no_grad():
        return module(**diffusers_call(dtype))[0]
