"""The layers that GPU benchmarks run: sizes of Wan2.1-1.3B, or small ones for a dry run, and their operands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels import quantize_act
from fxq.kernels.arguments import Operands
from fxq.kernels.gemm.fp8 import FP8, LARGEST
from fxq.models.causal_wan import CausalWanConfig

OUTLIER_FACTOR = 6.0
FP8Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        config: of the model.
        grid: token rows and columns of a frame.
        rows: tokens of a call: one frame, a chunk, two chunks.
        chunks: of a rollout.
        steps: denoising steps of a chunk.
        outliers: outlier channels of a linear by its input channels.
    """

    config: CausalWanConfig
    grid: tuple[int, int]
    rows: tuple[int, ...]
    chunks: int
    steps: tuple[float, ...]
    outliers: dict[int, int]

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(input, output) channels: FFN first, then the merged q, k, v, then attention."""
        dim, hidden = self.config.dim, self.config.ffn_dim
        return ((dim, hidden), (hidden, dim), (dim, 3 * dim), (dim, dim))


WAN = Sizes(CausalWanConfig.wan_1_3b(), (30, 52), (4680, 1560, 9360), 7, (1000, 750, 500, 250), {1536: 96, 8960: 288})
DRY = Sizes(
    CausalWanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=1, text_dim=64, text_len=16),
    (4, 5),
    (60,),
    2,
    (1000, 500),
    {512: 32, 1024: 64},
)


@dataclass(frozen=True)
class Layer:
    """A bfloat16 linear ``[rows, K] -> [rows, N]`` in ``[normal | outlier]`` order, large where inputs are outliers."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    split: int

    @classmethod
    def random(cls, rows: int, width: int, outputs: int, outliers: int, device: str) -> Layer:
        """From seed 0."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        x, weight = normal(rows, width), normal(outputs, width) / width**0.5
        x[:, width - outliers :] *= OUTLIER_FACTOR
        return cls(x.bfloat16(), weight.bfloat16(), normal(outputs).bfloat16(), width - outliers)

    @property
    def flop(self) -> float:
        """Of one product."""
        return 2.0 * self.x.shape[0] * self.weight.numel()

    def exact(self, rows: Tensor) -> Tensor:
        """float64 result of some rows."""
        return self.x[rows].double() @ self.weight.double().T + self.bias.double()

    def _largest(self, split: int) -> tuple[Tensor, Tensor]:
        """Largest absolute input [G] and weight [G, N] of each group."""
        parts = numerics.group_slices(self.x.shape[1], split)
        x = torch.stack([self.x[:, part].float().abs().max() for part in parts])
        return x, torch.stack([self.weight[:, part].float().abs().amax(1) for part in parts])

    def integers(self, dual: bool = True, bits: int = 8) -> Operands:
        """Quantized with one or two scales, weights to ``bits``."""
        split = self.split if dual else self.x.shape[1]
        x, weight = self._largest(split)
        scale, weight_scale = x / 127, weight / numerics.integer_range(bits)[1]
        zero = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        q_weight = numerics.quantize_weight(self.weight, weight_scale, split, bits)
        offset = numerics.fold_offset(self.bias, q_weight, weight_scale, scale, zero, split)
        q = quantize_act.reference(self.x, None, scale, zero, split, 8)
        stored = numerics.pack_int4(q_weight) if bits <= 4 else q_weight
        return Operands(q, stored, weight_scale, scale, offset, split, bits)

    def floats(self) -> FP8Operands:
        """Quantized to float8 with two scales; the arguments of dual_scale_linear_fp8 but for the dtype."""
        x, weight = self._largest(self.split)
        scale, weight_scale = x / LARGEST, weight / LARGEST

        def to_fp8(values: Tensor, scales: Tensor) -> Tensor:
            parts = numerics.group_slices(values.shape[1], self.split)
            scaled = [values[:, part].float() / scales[g] for g, part in enumerate(parts)]
            return torch.cat(scaled, dim=1).clamp(-LARGEST, LARGEST).to(FP8)

        q_weight = to_fp8(self.weight, weight_scale.unsqueeze(-1))
        return to_fp8(self.x, scale), q_weight, weight_scale, scale, self.bias.float(), self.split


def wan_layers(sizes: Sizes, device: str, rows: int) -> list[Layer]:
    """The layers of :attr:`Sizes.linears`."""
    return [Layer.random(rows, width, outputs, sizes.outliers[width], device) for width, outputs in sizes.linears]
