"""The recipes that compete in a block and in a rollout: speed does not depend on how well integers are chosen."""

from __future__ import annotations

import dataclasses

from fxq.bench.ours import speed_recipe
from fxq.core.config import Recipe
from fxq.core.method import AttentionScheme

STATIC, DYNAMIC, INT8_ATTENTION = "fxq", "fxq, scales per token", "fxq, attention in int8"
ANY_ERROR = 1e9


def recipes() -> dict[str, Recipe]:
    """By the name of their contestant: two static scales, scales per token, and the first with attention in 8 bits.

    That takes integers whatever its error: random weights say nothing of it.
    """
    static = speed_recipe(dual_scale=True)
    attention = AttentionScheme(scheme="int8", max_error=ANY_ERROR)
    return {
        STATIC: static,
        DYNAMIC: speed_recipe(dual_scale=True, per_token=True),
        INT8_ATTENTION: dataclasses.replace(static, name=f"{static.name}, int8 attention", attention=attention),
    }


def ours_name(recipe: str) -> str:
    """Of the contestant that replays a CUDA graph."""
    return f"{recipe}, CUDA graph"
