"""A recipe's cache in the graph: its codecs, and its maps in the place of history."""

from __future__ import annotations

from typing import cast

from torch import fx

from fxq.cache.policy import CachePolicy
from fxq.cache.settings import policy_from_json
from fxq.cache.store import Memories
from fxq.core.facts import Facts
from fxq.core.ir import QuantGraph
from fxq.core.pipeline import Rewrite, run_passes
from fxq.passes.absorb_cache import AbsorbCache, absorb_cache
from fxq.passes.pack_cache import PackCache, pack_cache


def check_cache(graph: QuantGraph, policy: CachePolicy) -> None:
    """Refuse a policy that the graph cannot follow, before anything else is done. The graph is not changed.

    Raises:
        PassError: with what would do.
    """
    run_passes(graph.fork(), cache_passes(policy))


def cache_passes(policy: CachePolicy) -> tuple[Rewrite, ...]:
    """What makes a graph of any stage take keys and values as the policy keeps them."""
    packing = (PackCache(policy),) if policy.packs else ()
    return packing if policy.absorb is None else (*packing, AbsorbCache(policy))


def with_cache(module: fx.GraphModule, policy: CachePolicy, tables: Memories | None = None) -> fx.GraphModule:
    """A module that takes keys and values as the policy keeps them; the module itself where it keeps them as they are.

    Args:
        module: of :func:`fxq.quantize` or :func:`fxq.load`, not changed.
        policy: what is kept, and how.
        tables: what its codecs learned from calibration.

    Raises:
        PassError: when the module has no cache of that kind, or the policy or the tables do not fit.
    """
    if policy.packs:
        module = pack_cache(module, policy, tables)
    return module if policy.absorb is None else absorb_cache(module, policy)


def policy_of(module: fx.GraphModule) -> CachePolicy | None:
    """The cache policy that a module was quantized for, of its recipe: what its rollouts must keep. None: any.

    Raises:
        ValueError: when fxq did not make the module.
    """
    data = cast(dict[str, object], Facts.of(module).recipe).get("cache")
    return None if data is None else policy_from_json(data)
