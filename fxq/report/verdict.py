"""Sentences about a report, chosen by its numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

from fxq.report.data import Comparison, Report, Variant

Outcome = Literal["lower", "higher", "unresolved"]

METRICS = {
    "teacher_forced": "teacher-forced error",
    "latent_mse": "latent MSE of the free rollout",
    "psnr": "PSNR",
    "ssim": "SSIM",
}
"""Metric names in words."""

_FEW_VIDEOS = 16


def metric_name(metric: str) -> str:
    """A metric in words."""
    return METRICS.get(metric, metric.replace("_", " "))


def outcome(comparison: Comparison) -> Outcome:
    """Which side has the lower error, or ``unresolved`` when the interval contains 1 or is not a number."""
    if comparison.high < 1:
        return "lower"
    if comparison.low > 1:
        return "higher"
    return "unresolved"


def ratio_text(value: float) -> str:
    """A ratio with two decimals; more where two would hide its size or its side of 1."""
    if not math.isfinite(value):
        return str(value)
    if 0 < abs(value) < 0.095:
        return f"{value:.2g}"
    short = f"{value:.2f}"
    if short != "1.00" or value == 1:
        return short
    finer = f"{value:.3f}"
    return f"{value:.5f}" if finer == "1.000" else finer


def interval_text(comparison: Comparison) -> str:
    """``0.31x (0.28 to 0.34)``."""
    low, high = ratio_text(comparison.low), ratio_text(comparison.high)
    return f"{ratio_text(comparison.ratio)}x ({low} to {high})"


@dataclasses.dataclass(frozen=True)
class ScoreGap:
    """One score of a variant against full precision with a 95 % interval of the difference (Agresti-Caffo)."""

    name: str
    reference: float
    value: float
    low: float
    high: float

    @property
    def outcome(self) -> Outcome:
        """Whether the difference is resolved, and its sign."""
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "unresolved"

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} vs {self.reference:.2f}"


def score_gaps(report: Report, variant: Variant) -> list[ScoreGap]:
    """Scores that are shares of videos, against full precision; the two sides are treated as independent samples."""
    names: list[str] = [n for n in ("shape", "colour", "motion") if n in report.full_precision and n in variant.scores]
    names = names or [n for n in report.full_precision if n in variant.scores]
    count = len(variant.psnr)
    gaps = []
    for name in names:
        reference, value = report.full_precision[name], variant.scores[name]
        p, q = ((share * count + 1) / (count + 2) for share in (value, reference))
        half = 1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / (count + 2))
        gaps.append(ScoreGap(name, reference, value, p - q - half, p - q + half))
    return gaps


def bit_widths(variants: Iterable[Variant]) -> dict[str, list[Variant]]:
    """Variants by bit width, in order of appearance."""
    groups: dict[str, list[Variant]] = {}
    for variant in variants:
        groups.setdefault(variant.bits, []).append(variant)
    return groups


def candidate_of(report: Report, bits: str) -> Variant:
    """The variant that a bit width's verdict is about: the first side of its first comparison, else its last row."""
    variants = bit_widths(report.variants)[bits]
    named = [c.a for c in report.comparisons if c.bits == bits]
    return next((v for v in variants if v.method in named[:1]), variants[-1])


def comparison_sentence(comparison: Comparison) -> str:
    """One comparison in words."""
    a, b, metric = comparison.a, comparison.b, metric_name(comparison.metric)
    interval = f"95 % interval {ratio_text(comparison.low)} to {ratio_text(comparison.high)}"
    ratio = ratio_text(comparison.ratio)
    match outcome(comparison):
        case "lower":
            return f"{a} has {ratio}x the {metric} of {b} ({interval})."
        case "higher":
            return f"{a} is worse than {b}: {ratio}x the {metric} ({interval})."
        case "unresolved":
            return f"{a} and {b} cannot be told apart in {metric}: {ratio}x ({interval}, which contains 1)."


def ablation_sentence(comparison: Comparison) -> str:
    """``helped``, ``did not help: worse`` or ``no effect resolved``."""
    return {
        "lower": "helped",
        "higher": "did not help: made it worse",
        "unresolved": "did not help: no effect resolved",
    }[outcome(comparison)]


def score_sentence(report: Report, variant: Variant) -> str:
    """What the scorer sees of a variant against full precision."""
    gaps = score_gaps(report, variant)
    if not gaps:
        return f"No scores were measured for {variant.method}."
    lost = [str(g) for g in gaps if g.outcome == "lower"]
    gained = [str(g) for g in gaps if g.outcome == "higher"]
    rest = [str(g) for g in gaps if g.outcome == "unresolved"]
    if not lost and not gained:
        return f"The scorer sees no difference between {variant.method} and full precision ({', '.join(rest)})."
    parts = []
    if lost:
        parts.append(f"{variant.method} loses {', '.join(lost)} against full precision")
    if gained:
        parts.append(f"{variant.method} gains {', '.join(gained)} against full precision")
    if rest:
        parts.append(f"no difference is resolved in {', '.join(rest)}")
    return f"The scorer sees a difference: {'; '.join(parts)}."


@dataclasses.dataclass(frozen=True)
class Verdict:
    """``lead`` sums up, ``bits`` has one paragraph per bit width, ``caveat`` says what could not have been seen."""

    lead: str
    bits: dict[str, str]
    caveat: str

    @property
    def sentences(self) -> list[str]:
        """All of it as lines of text."""
        return [self.lead, *(f"{bits}: {text}" for bits, text in self.bits.items()), self.caveat]


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _models(variants: Sequence[Variant], notes: Sequence[str] = ()) -> str:
    """``Q-ARVD at W8A8 and W4A8``; notes in brackets after each."""
    bits = [
        v.bits + (f" ({note})" if note else "") for v, note in zip(variants, notes or [""] * len(variants), strict=True)
    ]
    methods = {v.method for v in variants}
    if len(methods) == 1:
        return f"{variants[0].method} at {_and(bits)}"
    return _and([f"{v.method} {text}" for v, text in zip(variants, bits, strict=True)])


def _score_lead(report: Report, groups: Iterable[str]) -> str:
    found: dict[str, list[Variant]] = {}
    lost: list[str] = []
    for bits in groups:
        variant = candidate_of(report, bits)
        gaps = score_gaps(report, variant)
        kinds = {g.outcome for g in gaps}
        kind = next((k for k in ("lower", "higher", "unresolved") if k in kinds), "unmeasured")
        found.setdefault(kind, []).append(variant)
        if kind == "lower":
            lost.append(", ".join(str(g) for g in gaps if g.outcome == "lower"))
    parts = []
    if "unresolved" in found:
        parts.append(f"cannot tell {_models(found['unresolved'])} from full precision")
    if "higher" in found:
        parts.append(f"puts {_models(found['higher'])} above full precision")
    if "lower" in found:
        parts.append(f"sees a loss for {_models(found['lower'], lost)}")
    sentences = ["The scorer " + "; it ".join(parts) + "."] if parts else []
    if "unmeasured" in found:
        sentences.append(f"Nothing was scored for {_models(found['unmeasured'])}.")
    return " ".join(sentences)


def _comparison_lead(report: Report) -> str:
    metrics = [c.metric for c in report.comparisons]
    if not metrics:
        return ""
    metric = "teacher_forced" if "teacher_forced" in metrics else metrics[0]
    pairs: dict[tuple[str, str], dict[Outcome, list[str]]] = {}
    for c in report.comparisons:
        if c.metric == metric:
            pairs.setdefault((c.a, c.b), {}).setdefault(outcome(c), []).append(c.bits)
    words: dict[Outcome, str] = {"lower": "lower", "higher": "higher", "unresolved": "not resolvably different"}
    sentences = []
    for (a, b), found in pairs.items():
        parts = [f"{text} at {_and(found[kind])}" for kind, text in words.items() if kind in found]
        sentences.append(f"Against {b}, the {metric_name(metric)} of {a} is {_and(parts)}.")
    return " ".join(sentences)


def headline(report: Report) -> str:
    """What the smallest model is worth, in words that need no glossary; empty where nothing was measured."""
    groups = bit_widths(report.variants)
    if not groups:
        return ""
    best = min((candidate_of(report, bits) for bits in groups), key=lambda v: (v.size_ratio, -v.psnr.mean()))
    kinds = {gap.outcome for gap in score_gaps(report, best)}
    seen = {
        "lower": "an independent scorer sees what it lost",
        "higher": "an independent scorer sees no loss",
        "unresolved": "an independent scorer sees no loss",
    }
    kind = next((k for k in ("lower", "higher", "unresolved") if k in kinds), None)
    scored = f", and {seen[kind]}" if kind else ""
    return (
        f"With {best.bits.partition('A')[0].removeprefix('W')}-bit weights the model has {best.size_ratio:.2f} of its "
        f"size in bfloat16{scored}."
    )


def verdict(report: Report) -> Verdict:
    """The verdict on a report."""
    groups = bit_widths(report.variants)
    paragraphs = {}
    for bits in groups:
        compared = [comparison_sentence(c) for c in report.comparisons if c.bits == bits]
        paragraphs[bits] = " ".join([score_sentence(report, candidate_of(report, bits)), *compared])
    if not groups:
        return Verdict("No quantized model was measured.", {}, "")
    gaps = [g for bits in groups for g in score_gaps(report, candidate_of(report, bits)) if g.outcome == "unresolved"]
    videos = len(report.variants[0].psnr)
    caveat = f"Intervals are over {videos} videos"
    if videos < _FEW_VIDEOS:
        caveat += ", which is few: read them as rough"
    caveat += "."
    if gaps:
        width = max((g.high - g.low) / 2 for g in gaps)
        caveat += f" A score difference below about {width:.2f} would go unseen with this many."
    return Verdict(f"{_score_lead(report, groups)} {_comparison_lead(report)}".strip(), paragraphs, caveat)
