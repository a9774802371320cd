"""Rewrites: maps on the results of attention as inputs, and a variant that shows what the maps are fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxq import kernels
from fxq.cache.policy import CachePolicy
from fxq.calls.captured import convention, rules_of, set_convention
from fxq.core.facts import Facts
from fxq.core.graph import arguments
from fxq.core.ir import QuantGraph, Stage
from fxq.core.pipeline import PassError, Rewrite, run_passes
from fxq.core.signature import guard_inputs
from fxq.passes.fusions import fuse_attention
from fxq.passes.match import edits, patterns
from fxq.passes.match.cache_inputs import FEW, MAPS
from fxq.passes.match.inputs import Maker, set_inputs
from fxq.passes.match.patterns import ATEN, Unfit, is_call, shape_of, value_of
from fxq.passes.pack_cache import cached_layers, check_readable

_SDPA, _ATTENTION = ATEN.scaled_dot_product_attention.default, kernels.attention.definition
_PACKED, _ABSORB = kernels.attention_packed.definition, kernels.absorb.definition
_WEIGHTED = kernels.attention_weighted.definition


@dataclasses.dataclass(frozen=True)
class AbsorbCache(Rewrite):
    """``fxq::absorb`` on the result of every attention to a cache; the maps are one argument more, a list.

    It stands before the output projection and what quantizes its input. A map of zeros changes nothing, so layers are
    converted by other maps and by a shorter cache, in the graph that is there. Where the policy asks for keys and
    values that stand for a history, ``fxq::attention_weighted`` takes them; of none it is what it was.
    """

    policy: CachePolicy

    needs: ClassVar[Stage] = Stage.TRACED
    gives: ClassVar[Stage] = Stage.TRACED
    any_stage: ClassVar[bool] = True

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers with a map.

        Raises:
            PassError: when the policy absorbs nothing, or the graph has no attention to a cache.
        """
        if self.policy.absorb is None:
            raise PassError(
                "the cache policy absorbs nothing: set its absorb, for example CachePolicy(absorb=Absorb())"
            )
        if {MAPS, FEW} & set(convention(graph.module)[0]):
            raise PassError("the graph takes maps already: take the module that it was made from")
        try:
            nodes = list(_attentions(graph))
            check_readable(graph, nodes)
            if self.policy.absorb.tokens:
                return _weigh(graph, nodes)
            return _insert(graph, nodes, self.policy.absorb.groups(_heads(nodes[0])))
        except (Unfit, ValueError) as error:
            raise PassError(f"this graph cannot take maps: {error}") from error


def absorb_cache(module: fx.GraphModule, policy: CachePolicy) -> fx.GraphModule:
    """A module whose layers can be made to forget their history; nothing is traced again.

    Args:
        module: of :func:`fxq.quantize`, :func:`fxq.load`, :func:`fxq.optimize` or
            :func:`~fxq.passes.pack_cache.pack_cache`, not changed.
        policy: of the rollouts that the result runs in; its ``absorb`` says which form the maps have.

    Returns:
        A module with the same tensors.

    Raises:
        PassError: when the module has no cache as an input, or the policy absorbs nothing.
        ValueError: when fxq did not make the module.
    """
    facts = Facts.of(module)
    graph = run_passes(QuantGraph.of(module).fork(), (AbsorbCache(policy),))
    passes = (*facts.passes, *((name, touched) for name, touched, _ in graph.log))
    dataclasses.replace(Facts.of(graph.module), passes=passes).attach(graph.module)
    return guard_inputs(graph.module)


def _attentions(graph: QuantGraph) -> Iterator[fx.Node]:
    """Attentions to a cache, in graph order."""
    cached = {layer.attention for layer in cached_layers(graph)}
    for node in patterns.calls(graph, _SDPA, _ATTENTION, _PACKED):
        if node in cached or node.target == _PACKED:
            yield node


def _heads(node: fx.Node) -> int:
    shape = shape_of(arguments(node)["query"])[1:2] if node.target == _SDPA else shape_of(arguments(node)["q"])[2:3]
    return int(shape[0])


def _insert(graph: QuantGraph, nodes: list[fx.Node], groups: int) -> int:
    after = graph.module.graph.find_nodes(op="placeholder")[-1].next
    maker, maps = Maker(value_of(nodes[0])), []
    for i, node in enumerate(nodes):
        result = fuse_attention.result_of(node) if node.target == _SDPA else node
        batch, _, width = shape_of(result)
        each = int(width) // groups
        found = maker.input(after, f"absorb_map_{i}", (batch, groups, each, each), torch.float32)
        readers = list(result.users)
        args = (result, found)
        edits.check_fits(graph, kernels.absorb, args)
        absorbed = edits.insert(result.next, result, _ABSORB, args, value_of(result))
        for reader in readers:
            reader.replace_input_with(result, absorbed)
        maps.append(found)
    set_inputs(graph, {}, {MAPS: maps})
    return len(nodes)


def _weigh(graph: QuantGraph, nodes: list[fx.Node]) -> int:
    """Attention to a few keys more, of which there are none until a layer is converted."""
    after = graph.module.graph.find_nodes(op="placeholder")[-1].next
    maker, inputs = Maker(value_of(nodes[0])), []
    for i, node in enumerate(nodes):
        if node.target == _PACKED:
            raise Unfit("tokens that stand for a history do not go with a packed cache; use maps, tokens = 0")
        attention = fuse_attention.fused(graph, node) if node.target == _SDPA else node
        named = arguments(attention)
        batch, _, heads, width = shape_of(named["q"])
        dtype, few = value_of(named["q"]).dtype, maker.size(f"absorb_few_{i}", 2)
        form = (batch, few, heads)
        keys, values = (maker.input(after, f"absorb_{n}_{i}", (*form, width), dtype) for n in ("keys", "values"))
        weight = maker.input(after, f"absorb_weight_{i}", form, torch.float32)
        args = (named["q"], named["k"], named["v"], keys, values, weight)
        edits.check_fits(graph, kernels.attention_weighted, args)
        weighted = edits.insert(attention, attention, _WEIGHTED, args, value_of(attention))
        attention.replace_all_uses_with(weighted)
        graph.module.graph.erase_node(attention)
        inputs.append({"keys": keys, "values": values, "weight": weight})
    set_inputs(graph, {}, {FEW: inputs})
    return len(nodes)


@dataclasses.dataclass(frozen=True)
class ObserveAttention(Rewrite):
    """Gives (local, full) of each layer as a last result: attention to ``sink`` and new tokens, and to everything.

    Both are [B, S, dim] before the map. Such a graph runs in the warm-up alone and is not for saving.

    Args:
        sink: tokens of the sink, the first ones of the cache.
    """

    sink: int

    needs: ClassVar[Stage] = Stage.TRACED
    gives: ClassVar[Stage] = Stage.TRACED
    any_stage: ClassVar[bool] = True

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers that are shown.

        Raises:
            PassError: when no layer has a map.
        """
        pairs = [(self._local(graph, full), full) for full in _mapped(graph)]
        if not pairs:
            raise PassError("no layer of the graph takes a map: run AbsorbCache before")
        module = graph.module
        (end,) = module.graph.find_nodes(op="output")
        spec = module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
        results = pytree.tree_unflatten(list(end.args[0]), spec)
        results = (*results, pairs)
        end.args = (tuple(pytree.tree_leaves(results)),)
        names, in_spec = convention(module)
        rules = rules_of(module)
        assert rules is not None
        set_convention(module, names, in_spec, rules, pytree.tree_structure(results))
        return len(pairs)

    def _local(self, graph: QuantGraph, full: fx.Node) -> fx.Node:
        """Attention to sink and new tokens, beside that to everything."""
        node = full
        if node.target not in (_ATTENTION, _PACKED, _WEIGHTED):
            raise PassError(f"{full.name} is no attention of fxq")
        named, pieces = arguments(node), []
        for name in ("k", "v"):
            first, *_, last = named[name]
            if node.target != _PACKED:
                value = value_of(first)
                args = (first, 1, 0, self.sink)
                sizes = (value.shape[0], self.sink, *value.shape[2:])
                first = edits.insert(node, node, ATEN.slice.Tensor, args, value.new_empty(sizes))
            pieces.append([first, last])
        args = (named["q"], *pieces)
        return edits.insert(node.next, node, _ATTENTION, args, value_of(node))


def _mapped(graph: QuantGraph) -> Iterator[fx.Node]:
    """What a map is applied to, layer by layer, as attention of fxq."""
    for node in patterns.calls(graph, _ABSORB, _WEIGHTED):
        if node.target == _WEIGHTED:
            yield node
            continue
        x = arguments(node)["x"]
        if not is_call(x, _ATTENTION, _PACKED):
            for step in list(
                patterns.back(x, patterns.RESHAPES | frozenset({ATEN.transpose.int, ATEN.permute.default}))
            ):
                if is_call(step, _SDPA):
                    fuse_attention.fused(graph, step)
        yield arguments(node)["x"]


def observed(module: fx.GraphModule, sink: int) -> fx.GraphModule:
    """A copy of a module with maps that gives what they are fitted to, see :class:`ObserveAttention`."""
    graph = run_passes(QuantGraph.of(module).fork(), (ObserveAttention(sink),))
    return graph.module
