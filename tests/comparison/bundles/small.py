"""A small causal Wan and bundles of it."""

import functools
import pathlib

import torch

import fxq
from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Draws
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout

CONFIG = CausalWanConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=1, freq_dim=16, text_dim=12, text_len=5, in_dim=3, out_dim=3
)
CHUNKS = 3


def rollout(videos=2, window=-1, config=CONFIG):
    """Videos of three chunks of two frames of 8 x 8, each a batch."""
    torch.manual_seed(0)
    model = CausalWan(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.25) if parameter.ndim > 1 else None
    sampler = SamplerConfig(steps=(1000, 500), frames_per_chunk=2, cache=CachePolicy(window=window))
    batches = [
        ({"prompt_embeds": torch.randn(1, 5, config.text_dim)}, Draws([i], (2 * CHUNKS, 3, 8, 8)))
        for i in range(videos)
    ]
    return SelfForcingRollout(model, batches, sampler, any_size=True)


@functools.cache
def quantized(recipe):
    driven = rollout()
    args, shapes = driven.example_call()
    return fxq.quantize(driven.denoiser, None, recipe, example_inputs=args, dynamic_shapes=shapes, progress=False)


def bundle(folder: pathlib.Path, recipe="w8a8-dynamic") -> pathlib.Path:
    fxq.save(quantized(recipe), folder)
    return folder
