"""The causal Wan model of these tests, with outlier channels also in the layers that are split by rows."""

import dataclasses

import torch

from tests.toys import WAN, wan_rollout


def wan(heads=2, frames=6):
    """A rollout of two videos; with 3 frames a chunk two ranks meet within a frame."""
    config = dataclasses.replace(WAN, dim=96, ffn_dim=128, num_heads=heads)
    rollout = wan_rollout(frames=frames, config=config)
    rollout.sampler = dataclasses.replace(rollout.sampler, frames_per_chunk=3)
    block = rollout.model.blocks[0]
    with torch.no_grad():
        for layer in (block.self_attn.o, block.ffn[2]):
            layer.weight[:, 3:40:4] *= 5
        for norm in (block.self_attn.norm_q, block.self_attn.norm_k, block.cross_attn.norm_q):
            norm.weight.copy_(torch.linspace(0.5, 1.5, len(norm.weight)))
    return rollout


def diffusers_wan(dtype):
    """diffusers' ``WanTransformer3DModel`` of one block."""
    import diffusers

    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 48, "in_channels": 3, "out_channels": 3, "text_dim": 32}
    config |= {"freq_dim": 16, "ffn_dim": 128, "num_layers": 1, "cross_attn_norm": True, "rope_max_seq_len": 32}
    model = diffusers.WanTransformer3DModel(patch_size=(1, 2, 2), **config).eval().requires_grad_(False)
    block = model.blocks[0]
    for layer in (block.attn1.to_q, block.attn1.to_out[0], block.ffn.net[2]):
        layer.weight[:, 3:40:4] *= 5
    block.attn1.norm_q.weight.copy_(torch.linspace(0.5, 1.5, 96))
    return model.to(getattr(torch, dtype))


def diffusers_call(dtype):
    """Arguments of a call of :func:`diffusers_wan`."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 3, 4, 6, generator=random).to(getattr(torch, dtype))
    text = torch.randn(2, 7, 32, generator=random).to(x.dtype)
    t = torch.tensor([100, 400])
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": text, "return_dict": False}
