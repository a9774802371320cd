"""Tile sizes of the GEMM as data, and the pure function that chooses among them. Nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxq.kernels.gemm.activations import ACTIVATIONS


@dataclass(frozen=True)
class Tiles:
    """Sizes of one GEMM program.

    Attributes:
        block_m: rows of the activations.
        block_n: output channels.
        block_k: input channels per step of the normal segment; at least 64, so that half a block feeds a tensor core.
        warps: warps per program.
        stages: depth of the software pipeline.
        block_outlier: input channels per step of the outlier segment, at least 64.
        group_m: row blocks that run next to each other, so that they share the weights in the L2 cache.
        swapped: whether the weight is the left operand of the tensor cores; only packed weights gain.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    block_outlier: int = 64
    group_m: int = 8
    swapped: bool = False

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the pipeline, at most."""
        return (self.block_m + self.block_n) * self.block_k * self.stages

    def constants(self) -> dict[str, object]:
        """The kernel's compile-time arguments and launch options."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "BLOCK_OUTLIER": self.block_outlier,
            "GROUP_M": self.group_m,
            "SWAPPED": self.swapped,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


TABLE = (
    Tiles(128, 256, 64, warps=8, stages=3),
    Tiles(128, 128, 128, warps=8, stages=3),
    Tiles(64, 128, 128, warps=4, stages=3),
    Tiles(64, 64, 128, warps=4, stages=3),
    Tiles(16, 64, 128, warps=2, stages=4),
)
"""All tiles, largest first. Each fits the 99 KiB of shared memory of sm_86, 89 and 120."""

TWO_SUMS = (Tiles(128, 64, 128, warps=8, stages=3), *TABLE[3:])
"""Tiles of the product with scales per token for two groups of channels: it holds a sum for each."""

PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
"""Streaming multiprocessors of the usual GPU of each architecture (A100, A6000, 4090, H100, B200, 5090)."""

_LOAD_COST = 32
"""Multiply-adds per row and channel of the tile that take as long as loading one byte of an operand."""


def candidates(arch: int, operation: str = "store") -> tuple[Tiles, ...]:
    """The tiles whose kernels compile for ``sm_{arch}`` without spills.

    Args:
        arch: one of ``PROCESSORS``.
        operation: "store", "add", the activation before the next layer's quantization, or with scales per token
            "per_token" or, with zero points too, "asymmetric", of float8 "fp8_per_token", and for two groups of
            channels "per_token_dual"; with "_add" behind it where gate and residual follow.
    """
    if operation.startswith("per_token_dual"):
        return TWO_SUMS
    if operation == "asymmetric" or operation.endswith("_add") or (operation == "fp8_per_token" and arch == 100):
        return TABLE[1:]
    activation = ACTIVATIONS.get(operation)
    return TABLE[1:] if activation is not None and arch in activation.spills else TABLE


def choose(m: int, n: int, k: int, arch: int, *, packed: bool = False, operation: str = "store") -> Tiles:
    """Tiles for ``[m, k] @ [k, n]`` on ``sm_{arch}``; an unknown architecture counts as the next older known one.

    The estimate is (waves of programs) * (arithmetic + loads of one program). Small m never takes rows it cannot fill.
    Packed weights are always swapped: that takes fewer registers on every architecture, and on sm_90 the unpacked
    weight stays out of shared memory.
    """
    arch = max((known for known in PROCESSORS if known <= arch), default=min(PROCESSORS))

    def cost(tiles: Tiles) -> int:
        programs = -(-m // tiles.block_m) * -(-n // tiles.block_n)
        work = tiles.block_m * tiles.block_n + _LOAD_COST * (tiles.block_m + tiles.block_n)
        return -(-programs // PROCESSORS[arch]) * work

    best = replace(min(candidates(arch, operation), key=cost), swapped=packed)
    return replace(best, block_k=64) if k <= 64 else best
