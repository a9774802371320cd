"""Rewrite: attention reads encoded keys and values of a cache where dense ones came in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, fx

from fxq import kernels
from fxq.cache.codecs.codec import Codec, Kind, Memory
from fxq.cache.codecs.record import Field, Shape
from fxq.cache.named import codecs_text
from fxq.cache.policy import CachePolicy
from fxq.cache.store import Memories
from fxq.cache.tables import KINDS, check_tables, place
from fxq.calls.captured import convention
from fxq.core.facts import Facts
from fxq.core.graph import arguments
from fxq.core.ir import QuantGraph, Stage, inherit_meta, put_tensor
from fxq.core.method import STORED
from fxq.core.pipeline import PassError, Rewrite, run_passes
from fxq.core.signature import guard_inputs
from fxq.kernels.attention.codecs import codecs_of
from fxq.passes.fusions import fuse_attention
from fxq.passes.match import edits, patterns
from fxq.passes.match.cache_inputs import HELD, TABLES
from fxq.passes.match.inputs import Maker, Part, Size, set_inputs
from fxq.passes.match.patterns import ATEN, Unfit, is_call, same, shape_of, value_of

_SDPA, _ATTENTION = ATEN.scaled_dot_product_attention.default, kernels.attention.definition
_INTEGERS = kernels.ATTENTIONS[STORED].definition


class Layer(NamedTuple):
    """An attention, and the inputs with old keys and values among its pieces."""

    attention: fx.Node
    keys: fx.Node
    values: fx.Node


class _Parts(NamedTuple):
    """The inputs in the place of one: exact tokens of the sink, stored tensors by name, exact tokens.

    ``stored`` are those tensors, and the ones that the graph holds, in the codec's order.
    """

    sink: fx.Node
    packed: Mapping[str, fx.Node]
    recent: fx.Node
    stored: Sequence[fx.Node]

    @property
    def inputs(self) -> dict[str, object]:
        """Those that a call brings."""
        return {"sink": self.sink, "packed": self.packed, "recent": self.recent}


_Replaced = Mapping[fx.Node, _Parts]


@dataclasses.dataclass(frozen=True)
class PackCache(Rewrite):
    """Inputs of cached keys and values become those of a policy's codecs: sink, stored tensors, recent tokens.

    Found by what is done with them: an input that is joined with the new keys, or values, for attention alone. The
    graph then takes a dict for each where a tensor was, and the rotary tables of the encoded tokens in two arguments
    more (:func:`fxq.passes.match.cache_inputs.packed_inputs` makes all of them); ``fxq::attention_packed`` decodes a
    span at a time. Layers that the policy does not encode keep their inputs.

    Args:
        policy: what is kept, and how.
        tables: what its codecs learned from calibration, which the graph then holds as tensors; None: calls bring it.
    """

    policy: CachePolicy
    tables: Memories | None = dataclasses.field(default=None, repr=False, compare=False)

    needs: ClassVar[Stage] = Stage.TRACED
    gives: ClassVar[Stage] = Stage.TRACED
    any_stage: ClassVar[bool] = True

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers whose cache is packed.

        Raises:
            PassError: when the graph has no such inputs, or they do not fit the policy.
        """
        if not self.policy.packs:
            raise PassError(
                "the cache policy has no codec: set its keys or values, for example CachePolicy(keys=Klt())"
            )
        if TABLES[0] in convention(graph.module)[0]:
            raise PassError("the graph takes a packed cache already: pack the module that it was made from")
        try:
            layers = list(cached_layers(graph))
            check_readable(graph, layers, self.policy.integers)
            self.policy.check_layers(len(layers))
            return _rewrite(graph, self.policy, layers, self.tables)
        except (Unfit, ValueError) as error:
            raise PassError(f"the cache of this graph cannot be packed: {error}") from error


def pack_cache(module: fx.GraphModule, policy: CachePolicy, tables: Memories | None = None) -> fx.GraphModule:
    """A module that takes a packed cache in the place of dense keys and values; nothing is traced again.

    Args:
        module: of :func:`fxq.quantize`, :func:`fxq.load` or :func:`fxq.optimize`, not changed.
        policy: of the rollouts that the result runs in; what it keeps and encodes of the cache.
        tables: what codecs with ``fit="model"`` learned (:func:`fxq.cache.choose.cache_tables`), for the module to
            hold; None: the rollout brings it.

    Returns:
        A module with the same tensors, and the tables.

    Raises:
        PassError: when the module has no cache of that kind, or the policy or the tables do not fit.
        ValueError: when fxq did not make the module.
    """
    facts = Facts.of(module)
    graph = run_passes(QuantGraph.of(module).fork(), (PackCache(policy, tables),))
    passes = (*facts.passes, *((name, touched) for name, touched, _ in graph.log))
    dataclasses.replace(Facts.of(graph.module), passes=passes).attach(graph.module)
    return guard_inputs(graph.module)


def cached_layers(graph: QuantGraph) -> Iterator[Layer]:
    """Layers with a cache among the inputs, in the order in which the graph computes them."""
    for node in patterns.calls(graph, _SDPA, _ATTENTION, _INTEGERS):
        fused = node.target != _SDPA
        if fused:
            keys, values = arguments(node)["k"], arguments(node)["v"]
        else:
            keys, values = (_joined(arguments(node)[name]) for name in ("key", "value"))
        for k, v in zip(keys, values, strict=False):
            if all(x.op == "placeholder" and patterns.only_user(x) is not None for x in (k, v)) and len(keys) == 2:
                rows = shape_of(arguments(node)["q" if fused else "query"])
                new = next(x for x in keys if x is not k)
                if same(shape_of(new)[1:2], rows[1:2] if fused else rows[2:3]):
                    yield Layer(node, k, v)


def check_readable(graph: QuantGraph, layers: Sequence[object], integers: bool = False) -> None:
    """Refuse a graph without layers with a cache, and one whose attentions take no other keys and values.

    Args:
        graph: that is read.
        layers: found in it.
        integers: whether what is stored are the integers that attentions in 8 bits multiply.

    Raises:
        Unfit: with what would do.
    """
    if patterns.calls(graph, *(op.definition for op in kernels.ATTENTIONS.values() if op.definition != _INTEGERS)):
        raise Unfit(
            "its attentions multiply values in float8 and read them as they are; quantize with attention = 'int8' and "
            "codec int8_attention, or without attention in the recipe"
        )
    packed = patterns.calls(graph, kernels.attention_packed.definition)
    coded = [node for node in packed if any(c is not None and c.integers for c in codecs_of(arguments(node)["codec"]))]
    if (patterns.calls(graph, _INTEGERS) or coded) and not integers:
        raise Unfit(
            "its attentions multiply 8-bit integers and read keys and values as they are; store both by codec "
            "int8_attention without absorbed layers, or quantize without attention in the recipe"
        )
    if not layers:
        raise Unfit("no input is joined with new keys and values for attention alone")


def _joined(operand: fx.Node) -> list[fx.Node]:
    """What an operand of attention [B, heads, L, head_dim] is joined from along the tokens, or nothing."""
    steps = list(patterns.back(operand, frozenset({ATEN.transpose.int, ATEN.permute.default, ATEN.contiguous.default})))
    cat = steps[-1]
    if not is_call(cat, ATEN.cat.default) or any(patterns.only_user(step) is None for step in steps):
        return []
    return list(arguments(cat)["tensors"]) if arguments(cat)["dim"] in (1, -3) else []


def _rewrite(graph: QuantGraph, policy: CachePolicy, layers: list[Layer], tables: Memories | None) -> int:
    pairs = [(policy.codec("keys", i), policy.codec("values", i)) for i in range(len(layers))]
    chosen = [i for i, pair in enumerate(pairs) if pair != (None, None)]
    if not chosen:
        raise Unfit(f"the policy encodes none of its {len(layers)} layers")
    spans = {_tokens(layers[i]) * policy.span for i in chosen}
    if len(spans) > 1:
        raise Unfit(f"its layers take {sorted(spans)} tokens in {policy.span} calls: expected one number")
    first = layers[chosen[0]]
    made = _Inputs(graph, value_of(first.keys), spans.pop())
    if tables is not None:
        if own := [n for n in graph.module.graph.find_nodes(op="get_attr") if str(n.target).startswith(f"{HELD}.")]:
            raise Unfit(f"the model has a tensor of its own named {own[0].target}: rename it")
        check_tables(policy, tables, made.shape(first.keys), len(layers))
    rotary = made.tables(graph.module.graph.find_nodes(op="placeholder")[-1], shape_of(first.keys)[3])
    replaced: dict[fx.Node, _Parts] = {}
    for i in chosen:
        layer, number = layers[i], made.maker.size(f"packed_spans_{i}", 2)
        for kind, old, codec, memories in zip(KINDS, layer[1:], pairs[i], tables or ((), ()), strict=True):
            held = made.held(layer.attention, f"{HELD}.{place(kind, i)}", memories[i] if memories else {})
            replaced[old] = made.prefix(old, codec, kind, number, held)
        text = codecs_text(*pairs[i], integers=layer.attention.target == _INTEGERS)
        _replace_attention(graph, layer, replaced, rotary, text, made.span)
    lengths = {
        node: Part(parts.inputs, ((parts.sink, 1), (rotary[0], 0), (parts.recent, 1)))
        for node, parts in replaced.items()
    }
    set_inputs(graph, lengths, dict(zip(TABLES, rotary, strict=True)))
    return len(chosen)


def _tokens(layer: Layer) -> int:
    """Tokens of a chunk: those that a call brings."""
    node = layer.attention
    rows = shape_of(arguments(node)["query"])[2] if node.target == _SDPA else shape_of(arguments(node)["q"])[1]
    if not isinstance(rows, int):
        raise Unfit("the number of tokens of a call varies: capture the model for frames of one size")
    return rows


def _replace_attention(
    graph: QuantGraph,
    layer: Layer,
    replaced: _Replaced,
    rotary: list[fx.Node],
    codec: str,
    span: int,
) -> None:
    node = layer.attention
    if node.target == _SDPA:
        node = fuse_attention.fused(graph, node)
    named = arguments(node)

    def pieces(name: str, old: fx.Node) -> list[fx.Node]:
        parts = replaced[old]
        return [parts.sink, parts.recent, *(piece for piece in named[name] if piece is not old)]

    stored = [list(replaced[old].stored) for old in (layer.keys, layer.values)]
    args = (named["q"], pieces("k", layer.keys), pieces("v", layer.values), *stored, *rotary, codec, span)
    edits.check_fits(graph, kernels.attention_packed, args)
    packed = edits.insert(node, node, kernels.attention_packed.definition, args, value_of(node))
    node.replace_all_uses_with(packed)
    edits.erase_unread(node)


class _Inputs:
    """Makes the inputs of a packed cache, and the tensors of codecs that the graph holds."""

    def __init__(self, graph: QuantGraph, like: Tensor, span: int) -> None:
        self.graph, self.maker, self.span = graph, Maker(like), span
        self.encoded = self.maker.size("packed_tokens", 2 * span)

    def tables(self, last: fx.Node, head_dim: int) -> list[fx.Node]:
        """Those of the encoded tokens, behind the last input."""
        after, shape = last.next, (self.encoded, head_dim // 2)
        return [self.maker.input(after, name, shape, torch.float32) for name in TABLES]

    def shape(self, old: fx.Node) -> Shape:
        """Of a layer's cache by its dense keys or values."""
        _, _, heads, width = shape_of(old)
        return Shape(heads, width, self.span)

    def held(self, before: fx.Node, name: str, tensors: Memory) -> dict[str, fx.Node]:
        """Tensors that the graph holds from now on, under ``name``."""
        found = {}
        for key, tensor in tensors.items():
            own = tensor.detach().to(self.maker.device).clone(memory_format=torch.contiguous_format)
            put_tensor(self.graph.module, f"{name}.{key}", own)
            with before.graph.inserting_before(before):
                found[key] = before.graph.get_attr(f"{name}.{key}")
            inherit_meta(found[key], before, self.maker.mode.from_tensor(own, static_shapes=True))
        return found

    def prefix(self, old: fx.Node, codec: Codec | None, kind: Kind, spans: Size, held: Mapping[str, fx.Node]) -> _Parts:
        """Inputs in the place of one with dense keys or values [B, L, heads, head_dim]; not of what is ``held``."""
        batch, _, heads, width = shape_of(old)
        dtype = value_of(old).dtype

        def exact(name: str, tokens: Size) -> fx.Node:
            return self.maker.input(old, f"{old.name}_{name}", (batch, tokens, heads, width), dtype)

        def stored(field: Field) -> fx.Node:
            return self.maker.input(
                old, f"{old.name}_{field.name}", field.size(batch, cast(int, spans), self.span), field.dtype
            )

        sink = exact("sink", self.maker.size(f"{old.name}_sink", 2))
        if codec is None:
            packed = {"exact": exact("exact", self.encoded)}
            order = list(packed.values())
        else:
            fields = codec.fields(self.shape(old), kind)
            packed = {field.name: stored(field) for field in fields if field.name not in held}
            order = [packed.get(field.name) or held[field.name] for field in fields]
        return _Parts(sink, packed, exact("recent", self.maker.size(f"{old.name}_recent", 3)), order)
