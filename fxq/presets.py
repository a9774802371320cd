"""The shipped recipes by name, and what makes one recipe of another."""

from __future__ import annotations

import dataclasses

from fxq.core.config import Recipe, Rule, Scheme
from fxq.core.method import FLOAT8, LearningMethod, Method
from fxq.core.pipeline import Transform
from fxq.numerics import PACK_BLOCK
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.descent import CoordinateDescent
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.input_search import InputSearch
from fxq.passes.methods.ranges import MinMax, RangeSearch
from fxq.passes.methods.refit import RefitScales
from fxq.passes.transforms.conv_rot import ConvRot

_KEPT = (
    ("time_embedding*", "time embedding: tiny and sensitive"),
    ("time_projection*", "time projection: tiny and sensitive"),
    ("head*", "prediction head: tiny and sensitive"),
    ("*time_embed*", "time embedding: tiny and sensitive"),
    ("*timestep_embed*", "time embedding: tiny and sensitive"),
    ("*time_proj*", "time projection: tiny and sensitive"),
    ("*delta_embed*", "time embedding: tiny and sensitive"),
    ("proj_out*", "prediction head: tiny and sensitive"),
)
_ONCE = ("*cross_attn.k", "*cross_attn.v")


LEAST_ERROR: tuple[Method, ...] = (RangeSearch(), InputSearch(), GPTQ(), CoordinateDescent(), RefitScales())
"""The methods of the presets, see docs/methods.md; ``fxq compare`` measures them beside others."""

Q_ARVD: tuple[Method, ...] = (RangeSearch(), AdaRound())
"""Those of arXiv 2605.21072."""


def wan_recipe(
    name: str,
    scheme: Scheme,
    methods: tuple[Method, ...] = LEAST_ERROR,
    weighting: str = "gradient",
    seed: int = 0,
) -> Recipe:
    """The default rules for Wan-like transformers around one scheme.

    Time embedding, time projection and prediction head stay in model dtype. The text embedding, which is in no
    transformer block, has one scale. It and the cross-attention keys and values, which run once per prompt and see few
    rows, are quantized but not reconstructed (arXiv 2605.21072). These rules hold inside wrappers too (``wrapped`` of
    :class:`~fxq.core.config.Rule`).
    """
    once = dataclasses.replace(scheme, reconstruct=False)
    rules = tuple(Rule(pattern, None, reason, optional=True, wrapped=True) for pattern, reason in _KEPT)
    rules += (Rule("text_embedding*", dataclasses.replace(once, dual_scale=False), optional=True, wrapped=True),)
    rules += tuple(Rule(pattern, once, optional=True, wrapped=True) for pattern in _ONCE)
    return Recipe(name=name, rules=(*rules, Rule("*", scheme)), methods=methods, weighting=weighting, seed=seed)


def _without_data(name: str, weight_bits: int) -> Recipe:
    """Inputs of 8 bits with a scale per token; weights of least squared error: nothing is learned from data."""
    scheme = Scheme(weight_bits=weight_bits, per_token=True)
    return wan_recipe(name, scheme, methods=(RangeSearch(),), weighting="uniform")


def _token(name: str, weight_bits: int, input_bits: int, weighting: str) -> Recipe:
    """Inputs with a scale and a zero point per token; weights of least output error where there are data."""
    scheme = Scheme(weight_bits=weight_bits, input_bits=input_bits, per_token=True, asymmetric=True)
    return wan_recipe(name, scheme, weighting=weighting)


def _single(name: str, transforms: tuple[Transform, ...] = ()) -> Recipe:
    """What int8 formats of other runtimes hold: inputs with a scale per token, one weight scale per output channel."""
    scheme = Scheme(per_token=True, dual_scale=False)
    return dataclasses.replace(wan_recipe(name, scheme, weighting="uniform"), transforms=transforms)


def _float8(name: str, per_token: bool) -> Recipe:
    """e4m3 with one scale per output channel and one per tensor or token, which is what servers read."""
    scheme = Scheme(format=FLOAT8, per_token=per_token, dual_scale=False)
    return wan_recipe(name, scheme, methods=(RangeSearch(),), weighting="uniform")


def _q_arvd(bits: str, scheme: Scheme) -> Recipe:
    """The published method as it is (arXiv 2605.21072)."""
    return wan_recipe(f"q_arvd-{bits}", scheme, Q_ARVD, "sensitivity")


_WIDTHS = {"w8a8": Scheme(), "w4a8": Scheme(weight_bits=4), "w4a6": Scheme(weight_bits=4, input_bits=6)}

PRESETS: dict[str, Recipe] = {
    # At 8 bits the rounding of inputs makes most of the error, and all rows have it alike.
    "w8a8": wan_recipe("w8a8", _WIDTHS["w8a8"], weighting="uniform"),
    "w4a8": wan_recipe("w4a8", _WIDTHS["w4a8"]),
    "w4a6": wan_recipe("w4a6", _WIDTHS["w4a6"]),
    "w7a8": wan_recipe("w7a8", Scheme(weight_bits=7)),
    "w6a8": wan_recipe("w6a8", Scheme(weight_bits=6)),
    "w4a8-g32": wan_recipe("w4a8-g32", Scheme(weight_bits=4, weight_group=PACK_BLOCK)),
    "w8a8-dynamic": _without_data("w8a8-dynamic", 8),
    "w4a8-dynamic": _without_data("w4a8-dynamic", 4),
    "w8a8-token": _token("w8a8-token", 8, 8, "uniform"),
    "w4a8-token": _token("w4a8-token", 4, 8, "gradient"),
    "w4a6-token": _token("w4a6-token", 4, 6, "gradient"),
    "w8a8-single": _single("w8a8-single"),
    "w8a8-single-convrot": _single("w8a8-single-convrot", (ConvRot(),)),
    "fp8": _float8("fp8", per_token=False),
    "fp8-dynamic": _float8("fp8-dynamic", per_token=True),
    **{f"q_arvd-{bits}": _q_arvd(bits, scheme) for bits, scheme in _WIDTHS.items()},
}
"""Recipes by name. ``g32`` has a multiplier for every 32 channels of a weight. Those called ``dynamic``, ``token`` or
``single`` need no calibration data. ``token`` measure zero points too, and like ``single``, for formats of other
runtimes, learn from data where there are some. ``fp8`` are float8 e4m3, and search scales alone. ``q_arvd`` are the
published method."""


def single_scale(recipe: Recipe) -> Recipe:
    """The recipe without dual scales."""
    rules = tuple(
        rule
        if rule.scheme is None
        else dataclasses.replace(rule, scheme=dataclasses.replace(rule.scheme, dual_scale=False))
        for rule in recipe.rules
    )
    return dataclasses.replace(recipe, rules=rules)


def with_groups(recipe: Recipe) -> Recipe:
    """The recipe with a multiplier for every 32 channels of its weights, which have 4 bits.

    Raises:
        RecipeError: where weights have more.
    """
    rules = tuple(
        rule
        if rule.scheme is None
        else dataclasses.replace(rule, scheme=dataclasses.replace(rule.scheme, weight_group=PACK_BLOCK))
        for rule in recipe.rules
    )
    return dataclasses.replace(recipe, name=f"{recipe.name}-g{PACK_BLOCK}", rules=rules)


def with_iterations(recipe: Recipe, iterations: int) -> Recipe:
    """The recipe with another number of iterations of the methods that learn."""
    methods = tuple(
        dataclasses.replace(m, iterations=iterations) if isinstance(m, LearningMethod) else m for m in recipe.methods
    )
    return dataclasses.replace(recipe, methods=methods)


def minmax(recipe: Recipe) -> Recipe:
    """The MinMax baseline of a recipe: same bits and layers, one scale, no search, no reconstruction."""
    return dataclasses.replace(
        single_scale(recipe), name=f"{recipe.name}-minmax", methods=(MinMax(),), weighting="uniform"
    )
