"""Bytes from shapes: weights, caches and activations of a causal Wan model. Nothing is allocated."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxq.cache.codecs import PRESETS
from fxq.cache.codecs.codec import Codec
from fxq.cache.policy import CachePolicy
from fxq.cache.sizes import cache_size
from fxq.core.config import Recipe
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.planning.workloads import Workload

BF16 = 2


@dataclass(frozen=True)
class LinearCall:
    """One linear in one denoiser call: name, rows it sees, input and output channels, whether it has a bias."""

    layer: str
    rows: int
    width: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored once they are old: by a codec, or as they are."""

    name: str
    codec: Codec | None = None

    def policy(self, workload: Workload, window: int) -> CachePolicy:
        """Spans of eight chunks, or of as many as the window has room for; without room for one, nothing is encoded."""
        chunk, kept = workload.frames_per_chunk, CachePolicy(window=window, sink=workload.sink)
        room = 8 if window == -1 else (window - workload.sink) // chunk - 2  # beside a recent chunk and the new one
        if self.codec is None or room < 1:
            return kept
        return replace(kept, keys=self.codec, values=self.codec, span=min(8, room))


CACHE_FORMATS = (
    CacheFormat("bf16"),
    CacheFormat("int8", PRESETS["int8"]),
    CacheFormat("qvg", PRESETS["qvg"]),
    CacheFormat("klt", PRESETS["klt"]),
)


def meta_model(config: CausalWanConfig) -> CausalWan:
    """The model in bf16 on the meta device."""
    with torch.device("meta"):
        return CausalWan(config).to(torch.bfloat16)


def linear_calls(model: CausalWan, frames: int, latent: tuple[int, int]) -> tuple[LinearCall, ...]:
    """Linears and their rows, read off a call of the model on the meta device.

    The call is one inside a video: ``frames`` new frames, some in the cache, text keys and values made before.

    Args:
        model: from :func:`meta_model`.
        frames: new frames of the call.
        latent: height and width of a frame.
    """
    found: list[LinearCall] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def note(module: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor, name: str = name) -> None:
                rows = inputs[0].shape[:-1].numel()
                sizes = (module.in_features, module.out_features)
                found.append(LinearCall(name, rows, *sizes, module.bias is not None))

            handles.append(module.register_forward_hook(note))
    with torch.inference_mode():
        _call_on_meta(model, frames, latent)
    for handle in handles:
        handle.remove()
    return tuple(found)


def _call_on_meta(model: CausalWan, frames: int, latent: tuple[int, int]) -> None:
    config = model.config
    _, rows, columns = config.patch_size
    tokens = frames * (latent[0] // rows) * (latent[1] // columns)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def cache(length: int) -> list[Tensor]:
        return [empty(1, length, config.num_heads, config.head_dim)] * config.num_layers

    x, t, context = empty(1, frames, config.in_dim, *latent), empty(1, frames).float(), empty(1, 0, config.text_dim)
    text, prefix, angles = cache(config.text_len), cache(tokens), empty(tokens, config.head_dim // 2).float()
    model(x, t, context, text, text, prefix, prefix, angles, angles)


@functools.cache
def weight_bits(recipe: Recipe | None, layer: str, width: int) -> int:
    """Bits of a linear's weight under a recipe, 16 where it keeps the model's dtype (or there is no recipe)."""
    rule = None if recipe is None else recipe.rule_for(layer)
    if rule is None or rule.scheme is None or (rule.scheme.weight_bits == 4 and width % 32):
        return 16
    return rule.scheme.code_bits


def quantized_bytes(width: int, outputs: int, bits: int) -> int:
    """Bytes of a quantized linear with two scales: integers, float32 scales and offset, the order of its channels."""
    groups = 2
    small = groups * outputs + 2 * groups + outputs + width  # weight_scale, input scale and zero_point, offset, perm
    return width * outputs * bits // 8 + 4 * small


def weight_bytes(model: CausalWan, recipe: Recipe | None = None) -> int:
    """Bytes of a model's weights, in bf16 or quantized by a recipe; every quantized layer is taken to have two scales.

    Args:
        model: from :func:`meta_model`.
        recipe: None keeps all in bf16.
    """
    total = sum(p.numel() for p in model.parameters()) * BF16
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            width, outputs = module.in_features, module.out_features
            if (bits := weight_bits(recipe, name, width)) < 16:
                total -= BF16 * outputs * (width + (module.bias is not None))
                total += quantized_bytes(width, outputs, bits)
    return total


def cache_bytes(workload: Workload, frames: int, window: int, stored: CacheFormat) -> int:
    """Bytes of keys and values after ``frames`` latent frames of one video, exact to the byte.

    What has not grown old enough for the codec, and the sink, are in bf16.

    Args:
        workload: the model and its rollout.
        frames: latent frames so far.
        window: in latent frames, -1 keeps all.
        stored: how older chunks are stored.
    """
    config = workload.config
    shape = (config.num_layers, config.num_heads, config.head_dim)
    policy = stored.policy(workload, window)
    return cache_size(policy, workload.frames_per_chunk, workload.tokens_per_frame, *shape, frames, BF16).total


def text_bytes(config: CausalWanConfig) -> int:
    """Bytes of the text keys and values of one prompt in bf16."""
    return 2 * config.num_layers * config.text_len * config.dim * BF16


def activation_bytes(workload: Workload, frames: int, window: int) -> int:
    """Bytes that are alive at the worst moment of a bf16 call beside weights and caches; an estimate.

    The worst moment is in attention (the queries, keys and values of one layer, its whole cache in one bf16 piece,
    which is also what a dequantized cache needs) or in the FFN (its hidden tensor twice); beside it lie the keys and
    values of all layers, new ones and those of the text, which a functional call returns.
    """
    config = workload.config
    tokens = workload.chunk_tokens
    keys = workload.kept_frames(frames, window) * workload.tokens_per_frame
    row = tokens * config.dim * BF16
    attention = 6 * row + 2 * keys * config.dim * BF16
    ffn = 3 * row + 2 * tokens * config.ffn_dim * BF16
    return 2 * config.num_layers * row + text_bytes(config) + max(attention, ffn)
