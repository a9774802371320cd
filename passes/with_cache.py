"""A recipe's cache in the graph: its codecs, and its maps in the place of history."""

from __future__ import annotations

from typing import cast

from torch import fx

from fxq.cache.policy import CachePolicy
from fxq.cache.settings import policy_from_json
from fxq.core.facts import Facts
from fxq.core.ir import QuantGraph
from fxq.core.pipeline import PassError, Rewrite, run_passes
from fxq.passes.absorb_cache import AbsorbCache, absorb_cache
from fxq.passes.pack_cache import PackCache, pack_cache


def check_cache(graph: QuantGraph, policy: CachePolicy) -> None:
    """Refuse a policy that the graph cannot follow, before anything else is done. The graph is not changed.

    Raises:
        PassError: with what would do.
    """
    for chosen in (policy.keys, policy.values):
        for codec in chosen if isinstance(chosen, tuple) else (chosen,):
            if codec is not None and codec.needs_tables:
                raise PassError(
                    f"codec {codec.name} with fit = 'model' needs what it learned from caches, which a recipe does not "
                    "hold: use fit = 'video', or fxq.passes.pack_cache and SelfForcingRollout(cache_tables=...)"
                )
    run_passes(graph.fork(), cache_passes(policy))


def cache_passes(policy: CachePolicy) -> tuple[Rewrite, ...]:
    """What makes a graph of any stage take keys and values as the policy keeps them."""
    packing = (PackCache(policy),) if policy.packs else ()
    return packing if policy.absorb is None else (*packing, AbsorbCache(policy))


def with_cache(module: fx.GraphModule, policy: CachePolicy) -> fx.GraphModule:
    """A module that takes keys and values as the policy keeps them; the module itself where it keeps them as they are.

    Raises:
        PassError: when the module has no cache of that kind, or the policy does not fit.
    """
    if policy.packs:
        module = pack_cache(module, policy)
    return module if policy.absorb is None else absorb_cache(module, policy)


def policy_of(module: fx.GraphModule) -> CachePolicy | None:
    """The cache policy that a module was quantized for, of its recipe: what its rollouts must keep. None: any.

    Raises:
        ValueError: when fxq did not make the module.
    """
    data = cast(dict[str, object], Facts.of(module).recipe).get("cache")
    return None if data is None else policy_from_json(data)
