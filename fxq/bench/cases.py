"""The shapes that are measured: those of Wan2.1-1.3B, and small ones to see that everything works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fxq.models.causal_wan import CausalWanConfig


@dataclass(frozen=True)
class LinearShape:
    """``[rows, width] @ [width, outputs]``; with ``hidden`` an FFN ``width -> hidden -> outputs`` around a GELU."""

    rows: int
    width: int
    outputs: int
    hidden: int | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """As "M1560 1536>8960 ffn.0"."""
        path = ">".join(str(size) for size in (self.width, self.hidden, self.outputs) if size is not None)
        return f"M{self.rows} {path} {self.label}".strip()


@dataclass(frozen=True)
class BlockShape:
    """One block: ``frames`` new frames of ``grid`` tokens attend to ``keys`` keys, the new ones included."""

    frames: int
    grid: tuple[int, int]
    keys: int
    config: CausalWanConfig = field(default_factory=CausalWanConfig.wan_1_3b)

    @property
    def rows(self) -> int:
        """New tokens."""
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def name(self) -> str:
        """As "M1560 L18720"."""
        return f"M{self.rows} L{self.keys}"


@dataclass(frozen=True)
class RolloutShape:
    """A video of ``chunks`` chunks of 3 frames with ``latent`` (height, width), generated in ``steps``."""

    config: CausalWanConfig
    latent: tuple[int, int]
    chunks: int = 7
    steps: tuple[float, ...] = (1000, 750, 500, 250)

    @property
    def name(self) -> str:
        """As "7 chunks of 390 tokens, dim 768, 8 blocks"."""
        tokens = 3 * (self.latent[0] // self.config.patch_size[1]) * (self.latent[1] // self.config.patch_size[2])
        return f"{self.chunks} chunks of {tokens} tokens, dim {self.config.dim}, {self.config.num_layers} blocks"


_WAN = ((1536, 1536, "attention"), (1536, 4608, "q, k, v"), (1536, 8960, "ffn.0"), (8960, 1536, "ffn.2"))
LINEAR_ROWS = (1560, 4680)


def linears(rows: Sequence[int] = LINEAR_ROWS) -> list[LinearShape]:
    """The linears of a block, and its FFN, for each number of rows."""
    found: list[LinearShape] = []
    for count in rows:
        found += [LinearShape(count, width, outputs, label=label) for width, outputs, label in _WAN]
        found.append(LinearShape(count, 1536, 1536, 8960, "ffn"))
    return found


QUICK_LINEARS = (LinearShape(96, 512, 512, label="attention"), LinearShape(96, 512, 512, 1024, "ffn"))

BLOCKS = (BlockShape(1, (30, 52), 1560), BlockShape(1, (30, 52), 18720), BlockShape(3, (30, 52), 4680))
QUICK_BLOCKS = (
    BlockShape(2, (4, 5), 60, CausalWanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=1, text_len=16)),
)

ROLLOUT = RolloutShape(CausalWanConfig(dim=768, ffn_dim=3072, num_heads=12, num_layers=8), (20, 26))
QUICK_ROLLOUT = RolloutShape(
    CausalWanConfig(dim=512, ffn_dim=1024, num_heads=8, num_layers=1, text_dim=64, text_len=16),
    (8, 8),
    chunks=2,
    steps=(1000, 500),
)

LEAST_SQNR = {
    "linear": {"float32": 80.0, "bfloat16": 35.0, "int8": 25.0, "int4": 12.0, "float8": 20.0},
    "block": {"float32": 80.0, "bfloat16": 30.0, "int8": 25.0, "int4": 10.0, "float8": 20.0},
    "rollout": {"float32": 80.0, "bfloat16": 30.0, "int8": 20.0},
    "model": {"float32": 80.0, "bfloat16": 35.0, "int8": 25.0, "float8": 20.0},
}
"""dB against the reference, by level and arithmetic; below it a contestant is wrong and gets no ratio. int4 is said of
weights alone."""
