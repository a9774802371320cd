"""Sequence parallelism after DeepSpeed Ulysses (arXiv 2309.14509): tokens over ranks, heads over ranks in attention."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxq.models.causal_wan import (
    CausalSelfAttention,
    CausalWan,
    CausalWanBlock,
    CausalWanConfig,
    DenoiserOutput,
    attention,
)
from fxq.models.self_forcing import SelfForcingRollout
from fxq.parallel.groups import Place, all_gather, all_to_all, place_in
from fxq.parallel.plan import ParallelError


def ulysses(model: nn.Module, group: dist.ProcessGroup | None = None) -> UlyssesWan:
    """A causal Wan model whose tokens are spread over the ranks of a group.

    Every rank holds all weights and calls the result with equal inputs. Static input scales are the same on every rank,
    so are the integers; only the order of float operations in attention may differ from the model on one GPU.

    Args:
        model: :class:`~fxq.models.causal_wan.CausalWan`, in floats or with the quantized linears of :func:`fxq.apply`.
        group: the ranks; the default group if None.

    Raises:
        ParallelError: when there is no process group, the model is another one, or its heads do not divide.
    """
    if not isinstance(model, CausalWan):
        raise ParallelError(
            f"the model is {type(model).__name__}, expected CausalWan: give fxq.apply(model, bundle), not a graph"
        )
    return UlyssesWan(model, place_in(group))


def local_config(config: CausalWanConfig, size: int) -> CausalWanConfig:
    """The configuration of the caches of one of ``size`` ranks: its heads, of the same width.

    Raises:
        ParallelError: when the heads do not divide.
    """
    if config.num_heads % size:
        raise ParallelError(
            f"{config.num_heads} heads cannot be split evenly over {size} ranks; use a number of ranks that divides "
            f"{config.num_heads}"
        )
    return dataclasses.replace(config, dim=config.dim // size, num_heads=config.num_heads // size)


def local_rollout(rollout: SelfForcingRollout, size: int) -> SelfForcingRollout:
    """The same rollout with caches of one of ``size`` ranks; run it with ``using(module)`` of a parallel module.

    Raises:
        ParallelError: when the heads do not divide.
    """
    with torch.device("meta"):
        model = CausalWan(dataclasses.replace(local_config(rollout.model.config, size), num_layers=1))
    model.config = local_config(rollout.model.config, size)
    model.patch_embedding = rollout.model.patch_embedding  # tells dtype and device
    local = copy.copy(rollout)
    local.model = model
    return local


class UlyssesWan(nn.Module):
    """The model with its tokens over ranks; see :func:`ulysses`.

    The self-attention caches hold the rank's heads and all tokens, the text caches all heads. Ranks have equal numbers
    of tokens, in parts of frames if need be.

    Args:
        model: the model.
        place: this rank.

    Raises:
        ParallelError: when the heads do not divide.
    """

    def __init__(self, model: CausalWan, place: Place) -> None:
        super().__init__()
        self.model, self.place = model, place
        self.heads = local_config(model.config, place.size).num_heads

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        cross_k: Sequence[Tensor],
        cross_v: Sequence[Tensor],
        prefix_k: Sequence[Tensor],
        prefix_v: Sequence[Tensor],
        cos: Tensor,
        sin: Tensor,
    ) -> DenoiserOutput:
        """As :meth:`fxq.models.causal_wan.CausalWan.forward`, on every rank with the whole of ``x``, ``cos``, ``sin``.

        Prefixes and new keys and values have the rank's heads [B, ..., heads / size, head_dim]; empty caches may have
        any number of heads.

        Raises:
            ParallelError: when the tokens cannot be split evenly.
        """
        model, frames, all_heads = self.model, x.shape[1], self.model.config.num_heads
        h = model.patchify(x)
        mine, index = self._tokens(h.shape[1], frames)
        e, e0 = (vector[:, index.to(x.device)] for vector in model.embed_time(t))
        text, h = model.text_embedding(context), h[:, mine]
        caches: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])
        for i, module in enumerate(model.blocks):
            block = cast(CausalWanBlock, module)
            pairs = zip((cross_k[i], cross_v[i]), block.cross_attn.kv(text), strict=True)
            text_kv = [torch.cat((_with_heads(old, all_heads), new), dim=1) for old, new in pairs]
            prefix = [_with_heads(cache, self.heads) for cache in (prefix_k[i], prefix_v[i])]
            attend = _Attend(self.place, cos[mine], sin[mine], prefix)
            h = block(h, e0, *text_kv, attend)
            for kept, tensor in zip(caches, [*attend.new, *text_kv], strict=True):
                kept.append(tensor)
        patches = all_gather(model.head(h, e), self.place)
        return model.unpatchify(patches, frames, x.shape[3], x.shape[4]), *caches

    def _tokens(self, total: int, frames: int) -> tuple[slice, Tensor]:
        """The rank's tokens, and the frame of each of the equal stretches that lie within a frame."""
        size, per_frame = self.place.size, total // frames
        if total % size:
            raise ParallelError(
                f"{total} tokens ({frames} frames of {per_frame}) cannot be split evenly over {size} ranks; use a "
                f"number of ranks that divides {total}, or chunks of another size"
            )
        count = total // size
        low = self.place.rank * count
        stretch = math.gcd(per_frame, count)
        return slice(low, low + count), torch.arange(low, low + count, stretch) // per_frame


def _with_heads(cache: Tensor, heads: int) -> Tensor:
    """A cache [B, tokens, heads, head_dim]; an empty one in that many heads."""
    return cache if cache.shape[1] else cache.new_zeros(cache.shape[0], 0, heads, cache.shape[3])


class _Attend:
    """Attention of the rank's heads to the cached prefix and all new tokens; keeps the new keys and values."""

    def __init__(self, place: Place, cos: Tensor, sin: Tensor, prefix: Sequence[Tensor]) -> None:
        self.place, self.cos, self.sin, self.prefix = place, cos, sin, prefix
        self.new: tuple[Tensor, Tensor] | tuple[()] = ()

    def __call__(self, attn: CausalSelfAttention, x: Tensor) -> Tensor:
        size = self.place.size
        # [3, B, S / size, ranks, heads / size, head_dim] -> [ranks, 3, B, S / size, heads / size, head_dim]
        parts = torch.stack(attn.qkv(x, self.cos, self.sin)).unflatten(3, (size, -1)).movedim(3, 0)
        q, k, v = all_to_all(parts, self.place).movedim(0, 2).flatten(2, 3)
        self.new = (k, v)
        out = attention(q, *(torch.cat(pair, dim=1) for pair in zip(self.prefix, self.new, strict=True)))
        parts = all_to_all(out.unflatten(1, (size, -1)).movedim(1, 0), self.place)
        return attn.o(parts.movedim(0, 2).flatten(2))
