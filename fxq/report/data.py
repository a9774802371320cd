"""What a comparison of quantized models produced: the one structure that tables, JSON and the HTML report read."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One quantized model on the evaluation videos.

    ``method`` and ``bits`` name it (``Q-ARVD``, ``W4A8``); ``size_ratio`` is bytes of the quantized linears over bf16;
    ``kept_bytes`` those of the linears that are kept, in bf16; ``latent_mse`` and ``teacher_forced`` are per video,
    float64 [V], against full precision with the same noise; ``chunk_mse`` and ``forced_chunks`` are these errors by
    chunk, float64 [V, chunks]; ``psnr`` (dB) and ``ssim`` are per video; ``scores`` the scorer's shares;
    ``quantized``/``kept`` count linears; ``seconds`` is the quantization time.
    """

    method: str
    bits: str
    size_ratio: float
    bytes: int
    kept_bytes: int
    latent_mse: NDArray[np.float64]
    teacher_forced: NDArray[np.float64]
    forced_chunks: NDArray[np.float64]
    chunk_mse: NDArray[np.float64]
    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]
    scores: dict[str, float]
    quantized: int
    kept: int
    seconds: float

    @property
    def whole_ratio(self) -> float:
        """Bytes of all linears over bf16, those that are kept as bf16."""
        bf16 = self.bytes / self.size_ratio if self.bytes else 0.0
        return (self.bytes + self.kept_bytes) / (bf16 + self.kept_bytes) if bf16 + self.kept_bytes else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Paired comparison ``a`` against ``b``: mean of log(a / b) per video with a 95 % bootstrap interval, as ratios."""

    metric: str
    bits: str
    a: str
    b: str
    ratio: float
    low: float
    high: float
    videos: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerView:
    """One linear in the report: its summary row, and the outlier rule's picture of it.

    ``norms`` float32 [K]: input-channel norms, descending; None for layers the rule does not look at.
    """

    layer: str
    quantized: bool
    reason: str
    bits: str
    shape: tuple[int, int]
    outliers: int
    raw_outliers: int
    output_sqnr: float | None
    kernel: str
    norms: NDArray[np.float32] | None = None
    median: float = 0.0
    threshold: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityView:
    """Chunk sensitivities under one recipe: ``alpha`` [chunks] with 95 % bootstrap bounds over ``videos`` videos."""

    bits: str
    alpha: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    videos: int


PUBLISHED_SENSITIVITY = (0.5462, 0.1668, 0.1189, 0.0789, 0.0534, 0.0263, 0.0096)
"""Self-Forcing W4A8 as published (arXiv 2605.21072)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """One evaluation video in several versions, uint8 [F, H, W, 3] by version name; ``Full precision`` is the first."""

    prompt: str
    frames: dict[str, NDArray[np.uint8]]
    chunk_mse: dict[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """What a model costs where it was measured: median seconds of a chunk, bytes of its weights and of its cache."""

    name: str
    seconds: float
    weight_bytes: int
    cache_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything one run of ``fxq demo`` measured.

    ``full_precision`` are the scorer's shares on the unquantized model; ``variants`` the main table; ``ablation`` what
    each part adds at one bit width; ``layers`` the linears of ``layers_of`` (for example ``Q-ARVD W4A8``);
    ``command`` and ``environment`` say how and where.
    """

    title: str
    command: str
    environment: dict[str, str]
    settings: dict[str, object]
    full_precision: dict[str, float]
    variants: tuple[Variant, ...]
    ablation: tuple[Variant, ...]
    comparisons: tuple[Comparison, ...]
    ablation_comparisons: tuple[Comparison, ...]
    sensitivity: tuple[SensitivityView, ...]
    layers_of: str
    layers: tuple[LayerView, ...]
    clips: tuple[Clip, ...]
    frames_per_chunk: int
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    running: tuple[Running, ...] = ()
