"""What is computed at each level: a float32 module, its inputs, and the rows that are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxq.bench.cases import BlockShape, LinearShape
from fxq.models.causal_wan import CausalSelfAttention, CausalWanBlock, CausalWanConfig, attention, rope_tables

OUTLIERS, FACTOR = 96, 6.0


@dataclass(frozen=True)
class Problem:
    """A float32 module in eval mode and its inputs in any dtype. ``pick`` takes what is compared from an output."""

    module: nn.Module
    args: Callable[[torch.dtype], tuple[Any, ...]]
    pick: Callable[[Any], Tensor]

    def model(self, dtype: torch.dtype) -> nn.Module:
        """A copy of the module in ``dtype``."""
        return copy.deepcopy(self.module).to(dtype)


def like_trained(module: nn.Module, seed: int = 0) -> None:
    """Draw the weights of every linear anew, in place: normally distributed, 96 input channels (or a sixteenth) x 6.

    Those of a new module are uniform and have no outlier channels. The speed of some integer kernels depends on how
    weights are distributed, and only outliers make the dual-scale path run.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=(3 * layer.in_features) ** -0.5)  # the variance of a new one
                count = min(OUTLIERS, layer.in_features // 16)
                channels = torch.randperm(layer.in_features, generator=generator)[:count].to(layer.weight.device)
                layer.weight[:, channels] *= FACTOR


def open_gates(module: nn.Module) -> None:
    """Set the gates of every block to 1, in place: random ones are so small that the output is the residual."""
    with torch.no_grad():
        for block in module.modules():
            if isinstance(block, CausalWanBlock):
                block.modulation[:, [2, 5]] = 1


class Stack(nn.Module):
    """Linears, with a GELU between two, inside a block: the outlier rule is about blocks."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(*layers)])

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [1, M, K] -> [1, M, N]."""
        return self.blocks[0](x)


def linear_problem(shape: LinearShape, device: str) -> Problem:
    """One linear, or linear, GELU and linear, on random rows; 64 of them are compared."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(shape.width, shape.hidden or shape.outputs)]
    if shape.hidden is not None:
        layers += [nn.GELU(approximate="tanh"), nn.Linear(shape.hidden, shape.outputs)]
    stack = Stack(layers).eval().requires_grad_(False)
    like_trained(stack)
    x = torch.randn(1, shape.rows, shape.width, dtype=torch.float32).to(device)
    rows = torch.linspace(0, shape.rows - 1, min(64, shape.rows), dtype=torch.float64).long()
    return Problem(stack.to(device), lambda dtype: (x.to(dtype),), lambda y: cast(Tensor, y)[:, rows.to(y.device)])


class _Attend:
    """Attention to cached keys and values and the new ones, as :class:`fxq.models.causal_wan.CausalWan` does it."""

    def __init__(self, prefix_k: Tensor, prefix_v: Tensor, cos: Tensor, sin: Tensor) -> None:
        self.prefix_k, self.prefix_v, self.cos, self.sin = prefix_k, prefix_v, cos, sin
        self.new: tuple[Tensor, ...] = ()

    def __call__(self, module: CausalSelfAttention, x: Tensor) -> Tensor:
        q, k, v = module.qkv(x, self.cos, self.sin)
        self.new = (k, v)
        return module.o(attention(q, torch.cat((self.prefix_k, k), dim=1), torch.cat((self.prefix_v, v), dim=1)))


class Block(nn.Module):
    """One block of a causal Wan model with everything it reads as arguments."""

    def __init__(self, config: CausalWanConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([CausalWanBlock(config)])

    def forward(
        self, x: Tensor, e: Tensor, text_k: Tensor, text_v: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        """``x`` [B, S, dim], ``e`` [B, F, 6, dim] and caches -> ``x`` and the new keys and values."""
        attend = _Attend(k, v, cos, sin)
        return (self.blocks[0](x, e, text_k, text_v, attend), *attend.new)


def block_problem(shape: BlockShape, device: str) -> Problem:
    """A block with random weights and caches; its whole hidden state is compared."""
    torch.manual_seed(0)
    config = shape.config
    block = Block(config).eval().requires_grad_(False)
    like_trained(block)
    open_gates(block)

    def cache(tokens: int) -> Tensor:
        return torch.randn(1, tokens, config.num_heads, config.head_dim, dtype=torch.float32, device=device)

    x = torch.randn(1, shape.rows, config.dim, dtype=torch.float32, device=device)
    e = 0.1 * torch.randn(1, shape.frames, 6, config.dim, dtype=torch.float32, device=device)
    floats = (x, e, cache(config.text_len), cache(config.text_len), *(cache(shape.keys - shape.rows) for _ in "kv"))
    height, width = shape.grid
    tables = tuple(t.to(device) for t in rope_tables(config.head_dim, shape.frames, height, width, shape.frames))

    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        return (*(t.to(dtype) for t in floats), *tables)

    return Problem(block.to(device), args, lambda output: output[0])
