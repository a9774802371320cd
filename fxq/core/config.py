"""What the user asks for: schemes, rules and recipes. Frozen data; matching is the only behaviour."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar

from fxq.cache.policy import CachePolicy
from fxq.core import method
from fxq.core.method import AttentionScheme, Method, RecipeError, Scheme
from fxq.core.pipeline import Transform, check_transforms
from fxq.core.rows import Weighting
from fxq.runtime.messages import close_names

__all__ = [
    "ROLES",
    "TOOL_NAMES",
    "Budget",
    "Recipe",
    "RecipeError",
    "Rule",
    "Scheme",
    "plain_layer",
    "with_budget",
]

TOOL_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile, FSDP and activation checkpointing put between a module and its owner."""

ROLES = ("first", "last", "conditioning")
"""What part a layer can play in a captured graph; :mod:`fxq.passes.match.roles` finds it."""


def plain_layer(name: str) -> str:
    """A dotted name without the parts of :data:`TOOL_NAMES`, wherever they stand."""
    return ".".join(part for part in name.split(".") if part not in TOOL_NAMES)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Layers matching ``pattern`` get ``scheme``; None keeps them in model dtype for ``reason``.

    A pattern is an exact layer name, a glob, or ``re:`` and a regular expression for the whole name; the name is the
    layer's from the root, without :data:`TOOL_NAMES`. An ``optional`` rule may match nothing. A ``wrapped`` rule also
    names layers of a model inside wrappers: ``head*`` matches ``head.0`` and ``generator.model.head.0``, but not
    ``blocks.0.head``, since a number in front means one of many blocks (see :meth:`Recipe.decide`). A rule with a
    ``role`` holds for those of the layers that have it, see :func:`fxq.passes.match.roles.roles_of`.
    """

    pattern: str
    scheme: Scheme | None
    reason: str = ""
    optional: bool = False
    wrapped: bool = False
    role: str = ""

    @property
    def rank(self) -> int:
        """Precedence of the pattern's kind: exact name 0, glob 1, regular expression 2, ``*`` for the rest 3."""
        if self.pattern == "*":
            return 3
        if self.pattern.startswith("re:"):
            return 2
        return 1 if any(c in self.pattern for c in "*?[") else 0

    def matches(self, layer: str, roots: Collection[str] = (), roles: Collection[str] = ()) -> bool:
        """Whether the rule holds for ``layer``.

        Args:
            layer: its name.
            roots: names with a number that hold a model all the same.
            roles: those that the layer has.
        """
        if self.role and self.role not in roles:
            return False
        layer = plain_layer(layer)
        if self._names(layer):
            return True
        if not self.wrapped:
            return False
        parts = layer.split(".")
        for i in range(1, len(parts)):
            prefix = ".".join(parts[:i])
            if (prefix in roots or not _has_number(parts[:i])) and self._names(".".join(parts[i:])):
                return True
        return False

    def _names(self, layer: str) -> bool:
        if self.rank == 2:
            return re.fullmatch(self.pattern[3:], layer) is not None
        if self.rank == 0:
            return layer == plain_layer(self.pattern)
        return fnmatch.fnmatchcase(layer, self.pattern)


def _has_number(parts: Sequence[str]) -> bool:
    return any(part.isdecimal() for part in parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How many bits the weights of each layer get is chosen: the least sum of predicted errors that a limit allows.

    One of four limits: ``bits_per_weight`` is the mean over the weights of the layers that rules quantize (scales not
    counted), ``ratio`` the bytes of all linears, as they are stored and with those that are kept, over their bytes in
    bf16; ``time`` what the kernels of the layers that rules quantize take on the device of the calibration over what
    the same layers take in model dtype, as measured (:mod:`fxq.passes.kernel_times`: the choice may differ from run to
    run); with ``max_error`` the bytes are the least whose predicted error is no greater. ``widths`` are what a layer
    may get: 4 to 8, or 16, which keeps it in model dtype. See :class:`~fxq.passes.choose_widths.ChooseWidths`.
    """

    bits_per_weight: float | None = None
    ratio: float | None = None
    time: float | None = None
    max_error: float | None = None
    widths: tuple[int, ...] = (4, 8)

    def __post_init__(self) -> None:
        given = {name: value for name in BUDGET_LIMITS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            told = ", ".join(given) or "none"
            raise RecipeError(f"budget: expected one of {', '.join(BUDGET_LIMITS)}, got {told}")
        name, value = next(iter(given.items()))
        if not 0 <= value < math.inf:
            raise RecipeError(f"budget: {name} = {value}: expected a finite number, not negative")
        known = sorted({*range(4, 9), 16} & set(self.widths))
        if list(self.widths) != known or len(known) < 2:
            raise RecipeError(f"budget: widths = {list(self.widths)}: expected two or more of 4..8, 16, ascending")

    @property
    def limit(self) -> tuple[str, float]:
        """Name and value of the limit."""
        return next((name, value) for name in BUDGET_LIMITS if (value := getattr(self, name)) is not None)

    @property
    def widest(self) -> int:
        """Bits of the widest integers."""
        return max(width for width in self.widths if width < 16)


BUDGET_LIMITS = ("bits_per_weight", "ratio", "time", "max_error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a quantized model besides the model and the data.

    Args:
        name: shown in reports.
        rules: tried by kind (exact name, glob, ``re:``, and ``*`` for what is left), then in order; the first match
            decides.
        methods: applied in order to each layer; see :mod:`fxq.passes.methods`.
        weighting: loss weight of a calibration row, the name of a :class:`~fxq.core.rows.Weighting`.
        rows_per_call: calibration rows kept per layer and denoiser call, beside those that are rare for their size.
        max_rows: calibration rows kept per layer; None: by its width, see
            :func:`fxq.calibration.row_sample.row_limit`.
        all_rows: methods that minimise a quadratic form have it of all calibration rows, not of those that are kept:
            K^2 numbers of each input with K channels (:class:`~fxq.core.rows.RowSums`).
        seed: of every random choice.
        share_inputs: layers of a block that read the same input are quantized as one: the same outlier channels, input
            scales and calibration rows. :func:`fxq.optimize` then gives them one quantize and one GEMM.
        cache: what a causal model's rollouts keep of their past and how; the quantized graph then takes keys and values
            as they are stored. None: the rollout's own policy, decoded.
        budget: a limit for which each layer's bits are chosen; None: those of the rules.
        transforms: equivalent rewritings of the float graph before it is quantized, in order; see
            :mod:`fxq.passes.transforms`.
        attention: which attentions multiply integers; None: none.
    """

    name: str
    rules: tuple[Rule, ...]
    methods: tuple[Method, ...]
    weighting: str = Weighting.SENSITIVITY.value
    rows_per_call: int = 512
    max_rows: int | None = None
    all_rows: bool = False
    seed: int = 0
    share_inputs: bool = True
    cache: CachePolicy | None = None
    budget: Budget | None = None
    transforms: tuple[Transform, ...] = ()
    attention: AttentionScheme | None = None
    __pydantic_config__: ClassVar[dict[str, bool]] = {"arbitrary_types_allowed": True}  # methods are checked here

    def __post_init__(self) -> None:
        if self.weighting not in list(Weighting):
            raise RecipeError(f"weighting {self.weighting!r}: expected one of {', '.join(Weighting)}")
        for name in ("rows_per_call", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} = {value}: expected at least 1")
        if self.all_rows and self.weighting not in (Weighting.UNIFORM, Weighting.GRADIENT):
            raise RecipeError(
                f"all_rows with weighting {self.weighting!r}, which weighs chunks: sums of rows do not know them; "
                "use weighting uniform or gradient, or all_rows = false"
            )
        for name, kind in (("cache", CachePolicy), ("budget", Budget), ("attention", AttentionScheme)):
            if (given := getattr(self, name)) is not None and not isinstance(given, kind):
                raise RecipeError(f"{name} is {type(given).__name__}, expected {kind.__name__} or None")
        absorbs = self.cache is not None and self.cache.absorb is not None
        if self.attention is not None and self.cache is not None and (self.cache.packs or absorbs):
            self.attention.check_cache(self.cache.integers and not absorbs)
        method.check_methods(self.methods)
        check_transforms(self.transforms, self.budget)
        for rule in self.rules:
            if rule.scheme is not None and not isinstance(rule.scheme, Scheme):
                raise RecipeError(
                    f"rule {rule.pattern!r}: scheme is {type(rule.scheme).__name__}, expected Scheme or None"
                )
            if self.budget is not None and rule.scheme is not None:
                rule.scheme.refuse_budget(rule.pattern)
            if rule.role not in ("", *ROLES):
                raise RecipeError(f"rule {rule.pattern!r}: role {rule.role!r}: expected one of {', '.join(ROLES)}")
            if rule.rank == 2:
                try:
                    re.compile(rule.pattern[3:])
                except re.error as error:
                    raise RecipeError(f"pattern {rule.pattern!r} is not a regular expression: {error}") from None

    @property
    def planned_rules(self) -> tuple[Rule, ...]:
        """What layers are planned with: the rules, with a budget at its widest integers, which every width fits."""
        if self.budget is None:
            return self.rules
        bits = self.budget.widest
        return tuple(
            dataclasses.replace(rule, scheme=rule.scheme and dataclasses.replace(rule.scheme, weight_bits=bits))
            for rule in self.rules
        )

    @property
    def chunk_weighting(self) -> Weighting:
        """How chunks are weighed."""
        return Weighting(self.weighting)

    def rule_for(self, layer: str, roots: Collection[str] = (), roles: Collection[str] = ()) -> Rule | None:
        """The rule that decides about ``layer``, or None; ``roots`` and ``roles`` as in :meth:`Rule.matches`."""
        for rule in sorted(self.rules, key=lambda rule: rule.rank):
            if rule.matches(layer, roots, roles):
                return rule
        return None

    def decide(
        self, layers: Iterable[str], roles: Mapping[str, Collection[str]] | None = None
    ) -> dict[str, Rule | None]:
        """The rule that decides about each of a model's layers, or None. Without a graph no layer has ``roles``.

        Where ``wrapped`` rules are concerned a name with a number holds a model, not a block, when layers that rules
        keep for two different reasons lie under it, or when all layers do and more numbers follow.
        """
        names = list(layers)
        roots = self._roots(names)
        return {name: self.rule_for(name, roots, (roles or {}).get(name, ())) for name in names}

    def _roots(self, layers: Iterable[str]) -> set[str]:
        names = [plain_layer(layer).split(".") for layer in layers]
        kept = [rule for rule in self.rules if rule.scheme is None]
        reasons: dict[str, set[str]] = {}
        for parts in names:
            for i in range(1, len(parts) if any(rule.wrapped for rule in kept) else 0):
                if _has_number(parts[:i]):
                    rest = ".".join(parts[i:])
                    found = reasons.setdefault(".".join(parts[:i]), set())
                    found.update(rule.reason for rule in kept if rule._names(rest))
        roots = {prefix for prefix, found in reasons.items() if len(found) > 1}
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
        common = [parts[0] for parts in shared] if len(names) > 1 else []
        if any(_has_number(parts[len(common) :]) for parts in names):
            roots |= {".".join(common[: i + 1]) for i in range(len(common))}
        return roots

    def check_patterns(self, layers: Iterable[str], roles: Mapping[str, Collection[str]] | None = None) -> None:
        """Refuse required rules that hold for no layer.

        Raises:
            RecipeError: naming the pattern, the closest layer names, and a layer that it would match inside a wrapper.
        """
        names = sorted(layers)
        roots = self._roots(names)
        for rule in self.rules:
            if rule.optional or any(rule.matches(name, roots, (roles or {}).get(name, ())) for name in names):
                continue
            if rule.role and any(dataclasses.replace(rule, role="").matches(name, roots) for name in names):
                told = f"of pattern {rule.pattern!r} has the role {rule.role!r} in this model"
                raise RecipeError(f"recipe {self.name!r}: no layer {told}; optional = true allows that")
            hint = close_names(rule.pattern, names) or f"the model has {len(names)} linears"
            inside = dataclasses.replace(rule, wrapped=True, role="")
            if found := next((name for name in names if inside.matches(name, roots)), None):
                hint = f"patterns start at the root; with wrapped = true it matches {found}"
            raise RecipeError(f"recipe {self.name!r}: pattern {rule.pattern!r} matches no layer; {hint}")


def with_budget(
    recipe: Recipe,
    *,
    bits_per_weight: float | None = None,
    ratio: float | None = None,
    time: float | None = None,
    max_error: float | None = None,
) -> Recipe:
    """The recipe with one limit of :class:`Budget`; widths are its own budget's, where it has one.

    Raises:
        RecipeError: when there is not one limit.
    """
    budget = Budget(bits_per_weight=bits_per_weight, ratio=ratio, time=time, max_error=max_error)
    widths = budget.widths if recipe.budget is None else recipe.budget.widths
    return dataclasses.replace(recipe, budget=dataclasses.replace(budget, widths=widths))
