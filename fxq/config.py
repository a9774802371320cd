"""What the user asks for: schemes, rules and recipes. Frozen data; matching is the only behaviour."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable
from typing import Any


class RecipeError(ValueError):
    """A recipe that cannot be read or that does not fit the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one linear is quantized.

    ``weight_bits`` 4 or 8 (per output channel, symmetric), ``input_bits`` 2..8 (static per tensor, asymmetric),
    ``dual_scale`` lets outlier channels have their own scales; ``tau``, ``alpha`` and ``align`` are the outlier rule
    (arXiv 2605.21072), ``reconstruct`` allows methods that learn from data on this layer. With ``per_token`` the input
    scales are measured per token at run time, symmetric: no input scale, zero point or calibration is needed.
    """

    weight_bits: int = 8
    input_bits: int = 8
    dual_scale: bool = True
    tau: float = 3.5
    alpha: float = 1.2
    align: int = 32
    reconstruct: bool = True
    per_token: bool = False

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8):
            raise RecipeError(f"weight_bits = {self.weight_bits}: expected 4 or 8")
        if not 2 <= self.input_bits <= 8:
            raise RecipeError(f"input_bits = {self.input_bits}: expected 2..8")
        if self.align <= 0 or self.align % 32:
            raise RecipeError(f"align = {self.align}: expected a positive multiple of 32, the packing block")

    @property
    def label(self) -> str:
        """Short name such as W4A8; the same for static and per-token inputs."""
        return f"W{self.weight_bits}A{self.input_bits}"

    @property
    def detail(self) -> str:
        """The label, and how inputs are scaled where that is not static: "W4A8 per token"."""
        return f"{self.label} per token" if self.per_token else self.label


@dataclasses.dataclass(frozen=True)
class Rule:
    """Layers matching ``pattern`` get ``scheme``; None keeps them in model dtype for ``reason``.

    A pattern is an exact layer name, a glob, or ``re:`` and a regular expression for the whole name. An
    ``optional`` rule may match nothing.
    """

    pattern: str
    scheme: Scheme | None
    reason: str = ""
    optional: bool = False

    @property
    def rank(self) -> int:
        """Precedence of the pattern's kind: exact name 0, glob 1, regular expression 2."""
        if self.pattern.startswith("re:"):
            return 2
        return 1 if any(c in self.pattern for c in "*?[") else 0

    def matches(self, layer: str) -> bool:
        """Whether the pattern names ``layer``."""
        if self.rank == 2:
            return re.fullmatch(self.pattern[3:], layer) is not None
        return layer == self.pattern if self.rank == 0 else fnmatch.fnmatchcase(layer, self.pattern)


WEIGHTINGS = ("sensitivity", "uniform", "exponential", "reversed", "single_scale_only")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a quantized model besides the model and the data.

    Args:
        name: shown in reports.
        rules: tried by kind (exact name, glob, ``re:``), then in order; the first match decides.
        methods: applied in order to each layer; see :mod:`fxq.passes.methods`.
        weighting: loss weight of a calibration row by its chunk. ``sensitivity`` measures it by forked rollouts,
            ``uniform`` is 1, ``exponential`` is 2^-i, ``reversed`` is the measured one backwards, and
            ``single_scale_only`` is the measured one in single-scale layers and 1 elsewhere (the released code of
            arXiv 2605.21072).
        rows_per_call: calibration rows kept per layer and denoiser call, beside those that are rare for their size.
        max_rows: calibration rows kept per layer.
        seed: of every random choice.
        share_inputs: layers of a block that read the same input are quantized as one: the same outlier channels, input
            scales and calibration rows. :func:`fxq.optimize` then gives them one quantize and one GEMM.
    """

    name: str
    rules: tuple[Rule, ...]
    methods: tuple[Any, ...]
    weighting: str = "sensitivity"
    rows_per_call: int = 256
    max_rows: int = 16384
    seed: int = 0
    share_inputs: bool = True

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise RecipeError(f"weighting {self.weighting!r}: expected one of {', '.join(WEIGHTINGS)}")
        for name in ("rows_per_call", "max_rows"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} = {getattr(self, name)}: expected at least 1")
        for method in self.methods:
            if isinstance(method, type) or not dataclasses.is_dataclass(method) or not hasattr(method, "apply"):
                raise RecipeError(
                    f"method {method!r}: expected an instance of a dataclass with apply(problem, update), "
                    "as RangeSearch()"
                )
        for rule in self.rules:
            if rule.scheme is not None and not isinstance(rule.scheme, Scheme):
                raise RecipeError(
                    f"rule {rule.pattern!r}: scheme is {type(rule.scheme).__name__}, expected Scheme or None"
                )
            if rule.rank == 2:
                try:
                    re.compile(rule.pattern[3:])
                except re.error as error:
                    raise RecipeError(f"pattern {rule.pattern!r} is not a regular expression: {error}") from None

    def rule_for(self, layer: str) -> Rule | None:
        """The rule that decides about ``layer``, or None."""
        for rule in sorted(self.rules, key=lambda rule: rule.rank):
            if rule.matches(layer):
                return rule
        return None

    def check_patterns(self, layers: Iterable[str]) -> None:
        """Refuse required patterns that match no layer.

        Raises:
            RecipeError: naming the pattern and the closest layer names.
        """
        names = sorted(layers)
        for rule in self.rules:
            if rule.optional or any(rule.matches(name) for name in names):
                continue
            close = difflib.get_close_matches(rule.pattern.removeprefix("re:"), names, n=3, cutoff=0.3)
            hint = f"close names: {', '.join(close)}" if close else f"the model has {len(names)} linears"
            raise RecipeError(f"recipe {self.name!r}: pattern {rule.pattern!r} matches no layer; {hint}")
