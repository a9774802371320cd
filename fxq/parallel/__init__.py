"""Quantized models on several GPUs: linears split over ranks (tensor parallel), or tokens (Ulysses).

Nothing here quantizes: it cuts what is quantized already.
"""

from fxq.parallel.layers import LayerShard, shard_column, shard_row
from fxq.parallel.plan import CAUSAL_WAN, DIFFUSERS_WAN, ParallelError, ShardPlan, ShardRule
from fxq.parallel.tensor import load_shard, tensor_parallel
from fxq.parallel.ulysses import UlyssesWan, local_rollout, ulysses

__all__ = [
    "CAUSAL_WAN",
    "DIFFUSERS_WAN",
    "LayerShard",
    "ParallelError",
    "ShardPlan",
    "ShardRule",
    "UlyssesWan",
    "load_shard",
    "local_rollout",
    "shard_column",
    "shard_row",
    "tensor_parallel",
    "ulysses",
]
