"""What a packed graph gets of a cache: stored tensors as they lie, and what it was packed for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxq.cache.codecs.codec import Kind, Memory
from fxq.cache.codecs.record import Field, Shape
from fxq.cache.named import codecs_text, stored_alike
from fxq.cache.policy import CachePolicy
from fxq.cache.store import Cache, Memories
from fxq.cache.tables import KINDS, below, from_tensors, learning, same_memory
from fxq.calls.captured import convention
from fxq.core.graph import arguments
from fxq.core.ir import get_tensor
from fxq.kernels import attention_packed
from fxq.kernels.attention.codecs import codecs_of

TABLES = ("packed_cos", "packed_sin")
"""Arguments of a packed graph beside those of the graph it was made from."""

HELD = "cache_tables"
"""Under this name a packed graph holds what its codecs learned from calibration."""

MAPS = "absorb_maps"
"""Argument of a graph whose layers can forget their history: a list of maps, one of each."""

FEW = "absorb_tokens"
"""As :data:`MAPS`, of keys and values that stand for histories: ``keys``, ``values`` and ``weight`` of each layer."""

LayerPrefix = Tensor | Mapping[str, Tensor | Mapping[str, Tensor]]
"""A layer's keys or values: rotated and joined, or ``sink``, ``recent`` and ``packed``, the stored tensors by name."""


Prefix = tuple[Sequence[LayerPrefix], Sequence[LayerPrefix]]
"""Per layer keys, rotated, and values, [B, P, heads, head_dim] each, or what a packed graph takes of them."""

Added = tuple[object, ...]
"""Arguments that a graph takes beside the model's: tables of encoded tokens, maps of absorbed layers."""


@dataclasses.dataclass(frozen=True)
class PackedInputs:
    """Inputs of a packed graph.

    Args:
        keys: per layer.
        values: per layer.
        cos: float32 [tokens, head_dim / 2] of the encoded tokens that are kept.
        sin: as ``cos``.
    """

    keys: Sequence[LayerPrefix]
    values: Sequence[LayerPrefix]
    cos: Tensor
    sin: Tensor


def packed_inputs(cache: Cache, held: bool = False) -> PackedInputs:
    """A cache as a packed graph takes it; nothing is decoded, and nothing but moved sinks is copied.

    Args:
        cache: of the rollout.
        held: whether the graph holds what lies with the model, so that it does not take it.
    """
    end = cache.first_packed + cache.packed
    begin = min(max(cache.first, cache.first_packed), end)
    cos, sin = cache.rotary.tables(end - begin, begin)
    device = cache.keys[0].exact.tensor.device
    layers = range(len(cache.keys))
    keys, values = ([_prefix(cache, kind, i, len(cos), held) for i in layers] for kind in KINDS)
    return PackedInputs(keys, values, cos.to(device), sin.to(device))


def _prefix(cache: Cache, kind: Kind, layer: int, tokens: int, held: bool) -> LayerPrefix:
    line, exact = cache.line(kind, layer), cache.line(kind, layer).exact.tensor
    if cache.line("keys", layer).codec is None and cache.line("values", layer).codec is None:
        return exact
    sink = cache.sink_of(kind, layer)
    if line.codec is None:
        begin = sink.shape[1]
        packed = {"exact": exact[:, begin : begin + tokens]}
        return {"sink": sink, "packed": packed, "recent": exact[:, begin + tokens :]}
    if line.spans is not None:
        stored, fields = line.spans.record.tensors, line.spans.fields
    else:
        span = cache.policy.span * cache.layout.chunk * cache.layout.tokens
        fields = line.codec.fields(Shape(exact.shape[2], exact.shape[3], span), kind)
        stored = {field.name: _empty(field, exact, line.memory) for field in fields}
    names = [field.name for field in fields if not (held and field.per == "model")]
    return {"sink": sink, "packed": {name: stored[name] for name in names}, "recent": exact}


def _empty(field: Field, like: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
    """What a codec stores of no span."""
    if field.per == "model" and field.name in memory:
        return memory[field.name]
    return torch.zeros(field.size(like.shape[0], 0, 1), dtype=field.dtype, device=like.device)


def graph_of(module: object) -> fx.GraphModule | None:
    """The captured graph that a module is, or was compiled from."""
    module = getattr(module, "_orig_mod", module)
    return module if isinstance(module, fx.GraphModule) else None


def cache_inputs(module: object, cache: Cache, added: Mapping[str, object]) -> tuple[Prefix, Added]:
    """What a module takes of a cache: dense keys and values, or encoded ones; and what else it takes.

    Args:
        module: that runs.
        cache: of the rollout.
        added: what absorbed layers give, by the name of the argument.

    Raises:
        ValueError: when the module was packed for another cache or holds other tables, or takes no maps where layers
            absorb.
    """
    packing, names = Packing.of(module), added_arguments(module)
    if missing := [name for name in added if name not in names]:
        raise ValueError(
            f"the cache policy absorbs layers and the module does not take {missing[0]}: make one that does, "
            "fxq.passes.absorb_cache(module, policy)"
        )
    if unfit := [name for name in (MAPS, FEW) if name in names and name not in added]:
        raise ValueError(f"the module takes {unfit[0]} and the cache policy gives none: set its absorb")
    if packing is None:
        return cache.prefix(), tuple(added.values())
    chunk = cache.layout.tokens * cache.layout.chunk
    if packing != (wanted := Packing.for_cache(cache.policy, len(cache.keys), chunk)):
        raise ValueError(
            f"the module was packed for a cache of {packing}, the rollout keeps one of {wanted}: pack it with the "
            "cache policy of the sampler"
        )
    _, _, *heads = cache.keys[0].exact.tensor.shape
    held = held_tables(module, cache.policy, len(cache.keys), (heads[0], heads[1]))
    if held is not None:
        for kind, layer, _ in learning(cache.policy, len(cache.keys)):
            if not same_memory(cache.line(kind, layer).memory, held[KINDS.index(kind)][layer]):
                raise ValueError(
                    f"layer {layer}, {kind}: the cache was begun with other tables than the module holds: begin it "
                    "while the module runs, within rollout.using(module)"
                )
    found = packed_inputs(cache, held is not None)
    more = {**added, TABLES[0]: found.cos, TABLES[1]: found.sin}
    return (found.keys, found.values), tuple(more[name] for name in names)


def held_tables(module: object, policy: CachePolicy, layers: int, heads: tuple[int, int]) -> Memories | None:
    """What a packed graph holds for codecs that lie with the model, by layer; None where it holds nothing for them.

    Args:
        module: any; compiled ones as well.
        policy: that it was packed for.
        layers: of the model.
        heads: of a layer, and the channels of each.
    """
    if isinstance(taken := getattr(module, "takes_cache", None), TakesCache):
        return from_tensors(taken.tables, layers) if taken.tables else None
    graph = graph_of(module)
    if graph is None or TABLES[0] not in convention(graph)[0] or not policy.needs_tables:
        return None
    packed = [i for i in range(layers) if policy.codec("keys", i) or policy.codec("values", i)]
    calls = [arguments(node) for node in graph.graph.find_nodes(op="call_function", target=attention_packed.definition)]
    found: tuple[list[Memory], list[Memory]] = [{} for _ in range(layers)], [{} for _ in range(layers)]
    for layer, call in zip(packed, calls, strict=False):
        for kind, memories in zip(KINDS, found, strict=True):
            reads = model_reads(call, kind, heads)
            if reads and all(read.op == "get_attr" for read in reads.values()):
                memories[layer] = {name: get_tensor(graph, str(read.target)) for name, read in reads.items()}
    return found if any(memory for memories in found for memory in memories) else None


def model_reads(call: Mapping[str, Any], kind: Kind, heads: tuple[int, int]) -> dict[str, fx.Node]:
    """What a call of ``fxq::attention_packed`` reads of tensors that lie with the model, by their names.

    Args:
        call: its arguments by name.
        kind: of the codec.
        heads: of a layer, and the channels of each.
    """
    bound = codecs_of(str(call["codec"]))[KINDS.index(kind)]
    if bound is None:
        return {}
    fields = bound.stored(*heads, int(call["span"]))
    nodes = call[f"packed_{kind[0]}"]
    return {field.name: node for field, node in zip(fields, nodes, strict=True) if field.per == "model"}


def added_arguments(module: object) -> list[str]:
    """Names of the arguments that a module takes beside those that a model has."""
    if isinstance(taken := getattr(module, "takes_cache", None), TakesCache):
        return list(taken.arguments)
    graph = graph_of(module)
    return [] if graph is None else [name for name in convention(graph)[0] if name in (*TABLES, MAPS, FEW)]


@dataclasses.dataclass(frozen=True)
class Packing:
    """What a graph was packed for: ``codecs`` of its layers as operators take them, and ``spans`` of how many tokens.

    Layers that it takes no encoded keys or values of are left out.
    """

    codecs: tuple[str, ...]
    spans: tuple[int, ...]

    @classmethod
    def of(cls, module: object) -> Packing | None:
        """That of a module, compiled ones as well; None for one that takes dense keys and values."""
        if isinstance(taken := getattr(module, "takes_cache", None), TakesCache):
            return taken.packing
        graph = graph_of(module)
        if graph is None or TABLES[0] not in convention(graph)[0]:
            return None
        calls = graph.graph.find_nodes(op="call_function", target=attention_packed.definition)
        named = [arguments(node) for node in calls]
        return cls(
            tuple(stored_alike(str(call["codec"])) for call in named), tuple(int(call["span"]) for call in named)
        )

    @classmethod
    def for_cache(cls, policy: CachePolicy, layers: int, chunk: int) -> Packing:
        """That of caches with a policy.

        Args:
            policy: of the cache.
            layers: of the model.
            chunk: tokens of a chunk.
        """
        pairs = [(policy.codec("keys", i), policy.codec("values", i)) for i in range(layers)]
        texts = tuple(codecs_text(*pair) for pair in pairs if pair != (None, None))
        return cls(texts, (policy.span * chunk,) * len(texts))


@dataclasses.dataclass(frozen=True)
class TakesCache:
    """What a callable without a graph takes of a cache; it has one as its attribute ``takes_cache``.

    Args:
        arguments: as :func:`added_arguments`.
        packing: what it was packed for; None: it takes dense keys and values.
        tables: what it holds for its codecs, as :func:`fxq.cache.tables.to_tensors`.
    """

    arguments: tuple[str, ...] = ()
    packing: Packing | None = None
    tables: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, module: fx.GraphModule) -> TakesCache:
        """That of a graph."""
        held = below(dict(module.named_buffers(remove_duplicate=False)), f"{HELD}.")
        packing = Packing.of(module)
        return cls(tuple(added_arguments(module)), packing, held if packing is not None else {})
