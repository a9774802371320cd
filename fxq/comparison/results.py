"""The results of a comparison: rows pooled over seeds, paired with a base, and how far each metric ranks them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fxq.comparison.measure import Reference, Seconds
from fxq.comparison.reliability import Reliability, order_agreement, variation
from fxq.lab import compare
from fxq.report.data import Comparison, Variant

ERRORS = ("teacher_forced", "latent_mse")
_POOLED = (*ERRORS, "forced_chunks", "chunk_mse", "psnr", "ssim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one width on the videos of all seeds.

    ``variant`` has them one seed after the other; ``seeds`` are the means of its metrics by seed; ``seconds`` of
    quantizing, mean over seeds; ``paired`` the ratios of its errors to the base's by metric, empty where the base has
    no row of this width.
    """

    variant: Variant
    seeds: Mapping[int, Mapping[str, float]]
    seconds: Seconds
    paired: Mapping[str, Comparison]

    @property
    def forced_by_chunk(self) -> list[float]:
        """Teacher-forced error of each chunk, mean over videos."""
        means: list[float] = self.variant.forced_chunks.mean(0).tolist()
        return means

    @property
    def worst_chunk(self) -> int:
        """The chunk with the largest teacher-forced error, counted from 1."""
        return 1 + int(np.argmax(self.forced_by_chunk))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a comparison measured.

    ``full_precision`` are the scorer's shares without quantization, empty outside of the sprite world; ``chunks`` those
    of a video, ``trained`` those of one as long as in training; ``settings`` what all rows share.
    """

    title: str
    command: str
    date: str
    environment: Mapping[str, str]
    settings: Mapping[str, object]
    base: str
    rows: tuple[Row, ...]
    full_precision: Mapping[str, float]
    reliability: tuple[Reliability, ...]
    chunks: int
    trained: int

    @property
    def variants(self) -> list[Variant]:
        """Of every row."""
        return [row.variant for row in self.rows]

    @property
    def comparisons(self) -> list[Comparison]:
        """Of every row that is not its own base, first all of the one error, then of the other."""
        return [
            row.paired[m] for m in ERRORS for row in self.rows if m in row.paired and row.variant.method != self.base
        ]


def means_of(variant: Variant) -> dict[str, float]:
    """Each metric of a variant as one number, its object scores among them."""
    return {name: float(getattr(variant, name).mean()) for name in (*ERRORS, "psnr", "ssim")} | variant.scores


def pool(variants: Sequence[Variant]) -> Variant:
    """One method at one width on the videos of several seeds, which are equally many."""
    arrays: dict[str, Any] = {name: np.concatenate([getattr(v, name) for v in variants]) for name in _POOLED}
    scores = {name: float(np.mean([v.scores[name] for v in variants])) for name in variants[0].scores}
    seconds = float(np.mean([v.seconds for v in variants]))
    return dataclasses.replace(variants[0], **arrays, scores=scores, seconds=seconds)


def base_of(variant: Variant, base: str, variants: Sequence[Variant]) -> Variant | None:
    """The row that another is compared with: the base's of its width, or the only row that the base has."""
    own = [v for v in variants if v.method == base]
    if len(own) == 1:
        return own[0]
    return next((v for v in own if v.bits == variant.bits), None)


def rows_of(measured: Sequence[Mapping[int, tuple[Variant, Seconds]]], base: str) -> tuple[Row, ...]:
    """Rows from what was measured of each by seed, compared with the rows of method ``base``."""
    pooled = [pool([variant for variant, _ in by_seed.values()]) for by_seed in measured]
    rows = []
    for variant, by_seed in zip(pooled, measured, strict=True):
        against = base_of(variant, base, pooled)
        paired = {} if against is None else {c.metric: c for c in compare(variant, against)}
        seconds = [seconds for _, seconds in by_seed.values()]
        mean = {f.name: float(np.mean([getattr(s, f.name) for s in seconds])) for f in dataclasses.fields(Seconds)}
        means = {seed: means_of(v) for seed, (v, _) in by_seed.items()}
        rows.append(Row(variant=variant, seeds=means, seconds=Seconds(**mean), paired=paired))
    return tuple(rows)


def reliability_of(rows: Sequence[Row], full_precision: Mapping[str, float]) -> tuple[Reliability, ...]:
    """How far each metric ranks these rows."""
    ideal = {"teacher_forced": 0.0, "latent_mse": 0.0, "psnr": math.inf, "ssim": 1.0} | dict(full_precision)
    found = []
    for metric, full in ideal.items():
        values = [means_of(row.variant)[metric] for row in rows]
        by_method: dict[str, dict[str, float]] = {}
        for row, value in zip(rows, values, strict=True):
            by_method.setdefault(row.variant.method, {})[row.variant.bits] = value
        spread = [variation([means[metric] for means in row.seeds.values()], sample=True) for row in rows]
        known = [value for value in spread if math.isfinite(value)]
        found.append(
            Reliability(
                metric=metric,
                cv=variation(values),
                boa=order_agreement(by_method, full, lower=metric in ERRORS),
                between_seeds=float(np.mean(known)) if known else math.nan,
            )
        )
    return tuple(found)


def full_precision_of(references: Sequence[Reference]) -> dict[str, float]:
    """The scorer's shares in full precision, mean over seeds."""
    return {name: float(np.mean([r.scores[name] for r in references])) for name in references[0].scores}
