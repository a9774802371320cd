"""Causal Wan2.1 denoiser (Self-Forcing and relatives) in functional form.

State-dict keys and shapes are the official ones. Three things differ from the official code so that one
exported graph serves a whole rollout: the K/V cache is an input (prefix) and an output (new keys and
values) instead of a mutated buffer, RoPE is real-valued, and text keys/values are a second cache that
the first call fills. Architecture: Wan2.1 (arXiv 2503.20314), Self-Forcing (arXiv 2506.08009).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalWanConfig:
    """Shape of a causal Wan DiT; field names follow the official ``config.json``.

    ``dim`` model width, ``ffn_dim`` hidden width of the FFN, ``freq_dim`` width of the timestep sinusoid,
    ``text_dim``/``text_len`` width and padded length of the prompt embedding, ``in_dim``/``out_dim`` latent
    channels, ``patch_size`` (frames, rows, columns) per token.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"dim {self.dim} must split into {self.num_heads} heads of even size; change dim or num_heads"
            )
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size}: a causal model needs one frame per token, (1, h, w)")

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.dim // self.num_heads

    @classmethod
    def wan_1_3b(cls) -> CausalWanConfig:
        """Wan2.1-T2V-1.3B, the size of Self-Forcing, Causal-Forcing and LongLive v1."""
        return cls()

    @classmethod
    def wan_14b(cls) -> CausalWanConfig:
        """Wan2.1-T2V-14B, the size of Krea realtime."""
        return cls(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 and cast back."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., dim]; same shape and dtype."""
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return h.to(x.dtype) * self.weight


def rope_tables(
    head_dim: int, frames: int, height: int, width: int, start: int = 0, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the 3-D rotary embedding for a block of whole frames.

    The head is split as Wan does: the temporal part gets what two spatial parts of ``2 * (head_dim // 6)``
    channels leave.

    Args:
        head_dim: channels per head.
        frames: frames in the block.
        height: token rows per frame.
        width: token columns per frame.
        start: absolute index of the first frame.
        theta: base of the frequencies.

    Returns:
        Two float32 tensors ``[frames * height * width, head_dim // 2]``.
    """
    spatial = 2 * (head_dim // 6)
    sizes = (head_dim - 2 * spatial, spatial, spatial)
    axes = (
        torch.arange(start, start + frames, dtype=torch.float64).view(-1, 1, 1),
        torch.arange(height, dtype=torch.float64).view(1, -1, 1),
        torch.arange(width, dtype=torch.float64).view(1, 1, -1),
    )
    angles = []
    for size, axis in zip(sizes, axes, strict=True):
        frequency = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles.append((axis.unsqueeze(-1) * frequency).expand(frames, height, width, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of ``x`` [B, S, heads, head_dim] by ``cos``/``sin`` [S, head_dim / 2]."""
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2).to(x.dtype)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoid of timesteps ``t`` [...] as float64 [..., dim], cosines first."""
    half = dim // 2
    frequency = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = t.to(torch.float64).unsqueeze(-1) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unmasked attention on ``[B, S, heads, head_dim]``, returned as ``[B, S, heads * head_dim]``."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q: nn.Module = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k: nn.Module = RMSNorm(dim, eps) if qk_norm else nn.Identity()

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class CausalSelfAttention(_Attention):
    """Self-attention whose keys are normalised over all heads together, then rotated, then cached."""

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each ``[B, S, heads, head_dim]``, of ``x`` [B, S, dim]."""
        q = apply_rope(self._heads(self.norm_q(self.q(x))), cos, sin)
        k = apply_rope(self._heads(self.norm_k(self.k(x))), cos, sin)
        return q, k, self._heads(self.v(x))


class CrossAttention(_Attention):
    """Attention to the prompt; its keys and values are computed once per prompt."""

    def kv(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, L, heads, head_dim]`` of embedded text ``context`` [B, L, dim]."""
        return self._heads(self.norm_k(self.k(context))), self._heads(self.v(context))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``x`` [B, S, dim] attends to text ``k``, ``v`` [B, L, heads, head_dim]; returns [B, S, dim]."""
        q = self._heads(self.norm_q(self.q(x)))
        return self.o(attention(q, k, v))


SelfAttend = Callable[[CausalSelfAttention, Tensor], Tensor]
"""How a block attends to itself: ``(module, hidden [B, S, dim]) -> [B, S, dim]``, before the residual."""


class CausalWanBlock(nn.Module):
    """Modulated self-attention, cross-attention and FFN; one modulation vector per frame."""

    def __init__(self, config: CausalWanConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = CausalSelfAttention(dim, config.num_heads, config.qk_norm, eps)
        self.norm3: nn.Module = nn.LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(dim, config.num_heads, config.qk_norm, eps)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor, cross_k: Tensor, cross_v: Tensor, self_attend: SelfAttend) -> Tensor:
        """``x`` [B, S, dim] with S = F * tokens per frame, ``e`` [B, F, 6, dim]; returns [B, S, dim]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.unsqueeze(1) + e).unsqueeze(3).unbind(2)
        frames = e.shape[1]
        h = _modulate(self.norm1(x), shift1, scale1, frames)
        x = x + _gate(self_attend(self.self_attn, h), gate1, frames)
        x = x + self.cross_attn(self.norm3(x), cross_k, cross_v)
        h = _modulate(self.norm2(x), shift2, scale2, frames)
        return x + _gate(self.ffn(h), gate2, frames)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, frames: int) -> Tensor:
    return (x.unflatten(1, (frames, -1)) * (1 + scale) + shift).flatten(1, 2)


def _gate(x: Tensor, gate: Tensor, frames: int) -> Tensor:
    return (x.unflatten(1, (frames, -1)) * gate).flatten(1, 2)


class CausalHead(nn.Module):
    """Modulated norm and projection of tokens to patches."""

    def __init__(self, config: CausalWanConfig) -> None:
        super().__init__()
        _, rows, columns = config.patch_size
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, rows * columns * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """``x`` [B, S, dim], ``e`` [B, F, dim]; returns patches [B, S, rows * columns * out_dim]."""
        shift, scale = (self.modulation.unsqueeze(1) + e.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(_modulate(self.norm(x), shift, scale, e.shape[1]))


class _PrefixAttend:
    """Attend to a cached prefix and the new tokens; keeps the new keys and values for the caller."""

    def __init__(self, cos: Tensor, sin: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> None:
        self.cos, self.sin, self.prefix_k, self.prefix_v = cos, sin, prefix_k, prefix_v
        self.new: tuple[Tensor, Tensor] | None = None

    def __call__(self, attn: CausalSelfAttention, x: Tensor) -> Tensor:
        q, k, v = attn.qkv(x, self.cos, self.sin)
        self.new = (k, v)
        out = attention(q, torch.cat((self.prefix_k, k), dim=1), torch.cat((self.prefix_v, v), dim=1))
        return attn.o(out)


DenoiserOutput = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""(prediction, new keys, new values, text keys, text values); lists have one tensor per layer."""


class CausalWan(nn.Module):
    """Causal Wan DiT with a functional cache.

    Args:
        config: the shape of the model.

    Raises:
        ValueError: at construction, when the configuration is inconsistent.
    """

    def __init__(self, config: CausalWanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(CausalWanBlock(config) for _ in range(config.num_layers))
        self.head = CausalHead(config)

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B, F] -> head modulation [B, F, dim] and block modulation [B, F, 6, dim]."""
        dtype = self.patch_embedding.weight.dtype
        e = self.time_embedding(timestep_embedding(t, self.config.freq_dim).to(dtype))
        return e, self.time_projection(e).unflatten(-1, (6, -1))

    def patchify(self, x: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] -> tokens [B, F * H/ph * W/pw, dim]."""
        return self.patch_embedding(x.transpose(1, 2)).flatten(2).transpose(1, 2)

    def unpatchify(self, patches: Tensor, frames: int, height: int, width: int) -> Tensor:
        """Patches [B, S, ph * pw * C] -> latents [B, F, C, height, width] (sizes in latent pixels)."""
        _, ph, pw = self.config.patch_size
        grid = patches.unflatten(1, (frames, height // ph, width // pw)).unflatten(-1, (ph, pw, self.config.out_dim))
        return grid.permute(0, 1, 6, 2, 4, 3, 5).flatten(3, 4).flatten(4, 5)

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
        """One denoiser call on whole frames.

        Args:
            x: latents [B, F, C, H, W].
            t: timesteps [B, F] in 0..1000.
            context: prompt embedding [B, L, text_dim] on a prompt's first call, [B, 0, text_dim] afterwards.
            cross_k: per layer, text keys [B, L', heads, head_dim] of earlier calls; L' = 0 on the first call.
            cross_v: per layer, text values, as ``cross_k``.
            prefix_k: per layer, cached keys [B, P, heads, head_dim], rotated; P may be 0.
            prefix_v: per layer, cached values, as ``prefix_k``.
            cos: RoPE cosines [F * tokens per frame, head_dim / 2], see :func:`rope_tables`.
            sin: RoPE sines, as ``cos``.

        Returns:
            Prediction [B, F, C, H, W], then per layer the new keys and values (S tokens) and the text keys and
            values (L' + L tokens).
        """
        frames, height, width = x.shape[1], x.shape[3], x.shape[4]
        e, e0 = self.embed_time(t)
        text = self.text_embedding(context)
        h = self.patchify(x)
        new_k: list[Tensor] = []
        new_v: list[Tensor] = []
        text_k: list[Tensor] = []
        text_v: list[Tensor] = []
        for i, module in enumerate(self.blocks):
            block = cast(CausalWanBlock, module)
            k, v = block.cross_attn.kv(text)
            text_k.append(torch.cat((cross_k[i], k), dim=1))
            text_v.append(torch.cat((cross_v[i], v), dim=1))
            attend = _PrefixAttend(cos, sin, prefix_k[i], prefix_v[i])
            h = block(h, e0, text_k[i], text_v[i], attend)
            assert attend.new is not None
            new_k.append(attend.new[0])
            new_v.append(attend.new[1])
        return self.unpatchify(self.head(h, e), frames, height, width), new_k, new_v, text_k, text_v
