"""Which linears are split over ranks, as data: ordered patterns and the plans of known models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, get_args

from fxq.core.config import Rule
from fxq.runtime.messages import close_names

How = Literal["column", "row", "replicate"]
"""``column`` splits the outputs of a linear, ``row`` its inputs, ``replicate`` leaves all of it on every rank."""


class ParallelError(ValueError):
    """A model, plan or number of ranks that do not fit each other."""


@dataclasses.dataclass(frozen=True)
class ShardRule:
    """Layers matching ``pattern`` (as in :class:`fxq.Rule`) are split as ``how`` says; ``optional`` may match nothing.

    Raises:
        ParallelError: when ``how`` is unknown.
    """

    pattern: str
    how: How
    optional: bool = False

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise ParallelError(f"pattern {self.pattern!r}: {self.how!r}, expected one of {', '.join(get_args(How))}")

    def matches(self, layer: str) -> bool:
        """Whether the pattern names ``layer``."""
        return Rule(self.pattern, None).matches(layer)


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """Rules tried in order, the first match decides; what no rule matches is replicated."""

    rules: tuple[ShardRule, ...]

    def how(self, layer: str) -> How:
        """What is done with ``layer``."""
        return next((rule.how for rule in self.rules if rule.matches(layer)), "replicate")

    def check_patterns(self, layers: Iterable[str]) -> None:
        """Refuse required patterns that match no layer.

        Raises:
            ParallelError: naming the pattern and the closest layer names.
        """
        names = sorted(layers)
        for rule in self.rules:
            if rule.optional or any(rule.matches(name) for name in names):
                continue
            hint = close_names(rule.pattern, names) or f"the model has {len(names)} linears"
            raise ParallelError(f"shard plan: pattern {rule.pattern!r} matches no layer; {hint}")


def _plan(column: tuple[str, ...], row: tuple[str, ...]) -> ShardPlan:
    rules = [ShardRule(pattern, "column") for pattern in column] + [ShardRule(pattern, "row") for pattern in row]
    return ShardPlan(tuple(rules))


CAUSAL_WAN = _plan(
    ("blocks.*.self_attn.[qkv]", "blocks.*.cross_attn.[qkv]", "blocks.*.ffn.0"),
    ("blocks.*.self_attn.o", "blocks.*.cross_attn.o", "blocks.*.ffn.2"),
)
"""Attention by heads and the hidden channels of the FFN, in the names of Wan and Self-Forcing."""

DIFFUSERS_WAN = _plan(
    ("blocks.*.attn[12].to_[qkv]", "blocks.*.ffn.net.0.proj"), ("blocks.*.attn[12].to_out.0", "blocks.*.ffn.net.2")
)
"""The same in the names of diffusers' ``WanTransformer3DModel`` (text to video)."""
