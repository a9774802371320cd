"""Rewrite: attention reads encoded keys and values of a cache where dense ones came in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from fxq import kernels
from fxq.cache.codecs.codec import Codec, Kind
from fxq.cache.codecs.record import LEADING_AXES, Field, Shape
from fxq.cache.inputs import TABLES
from fxq.cache.named import codecs_text
from fxq.cache.policy import CachePolicy
from fxq.calls.captured import convention, rules_of, set_convention
from fxq.calls.conditions import Expression
from fxq.core.facts import Facts
from fxq.core.graph import arguments
from fxq.core.ir import QuantGraph, Stage, inherit_meta, module_note
from fxq.core.pipeline import PassError, Rewrite, run_passes
from fxq.core.signature import call_rules, guard_inputs
from fxq.passes.fusions import fuse_attention
from fxq.passes.match import edits, patterns
from fxq.passes.match.patterns import ATEN, Unfit, is_call, same, shape_of, value_of

_SDPA, _ATTENTION = ATEN.scaled_dot_product_attention.default, kernels.attention.definition


class _Layer(NamedTuple):
    """An attention, and the inputs with old keys and values among its pieces."""

    attention: fx.Node
    keys: fx.Node
    values: fx.Node


class _Parts(NamedTuple):
    """The inputs in the place of one: exact tokens of the sink, stored tensors by name, exact tokens."""

    sink: fx.Node
    packed: Mapping[str, fx.Node]
    recent: fx.Node


_Replaced = Mapping[fx.Node, _Parts]
_Size = int | torch.SymInt


@dataclasses.dataclass(frozen=True)
class PackCache(Rewrite):
    """Inputs of cached keys and values become those of a policy's codecs: sink, stored tensors, recent tokens.

    Found by what is done with them: an input that is joined with the new keys, or values, for attention alone. The
    graph then takes a dict for each where a tensor was, and the rotary tables of the encoded tokens in two arguments
    more (:func:`fxq.cache.inputs.packed_inputs` makes all of them); ``fxq::attention_packed`` decodes a span at a time.
    Layers that the policy does not encode keep their inputs.
    """

    policy: CachePolicy

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
            layers = list(_layers(graph))
            if not layers:
                raise Unfit("no input is joined with new keys and values for attention alone")
            self.policy.check_layers(len(layers))
            return _rewrite(graph, self.policy, layers)
        except (Unfit, ValueError) as error:
            raise PassError(f"the cache of this graph cannot be packed: {error}") from error


def pack_cache(module: fx.GraphModule, policy: CachePolicy) -> fx.GraphModule:
    """A module that takes a packed cache in the place of dense keys and values; nothing is traced again.

    Args:
        module: of :func:`fxq.quantize`, :func:`fxq.load` or :func:`fxq.optimize`, not changed.
        policy: of the rollouts that the result runs in; what it keeps and encodes of the cache.

    Returns:
        A module with the same tensors.

    Raises:
        PassError: when the module has no cache of that kind, or the policy does not fit.
        ValueError: when fxq did not make the module.
    """
    facts = Facts.of(module)
    graph = run_passes(QuantGraph.of(module).fork(), (PackCache(policy),))
    passes = (*facts.passes, *((name, touched) for name, touched, _ in graph.log))
    dataclasses.replace(Facts.of(graph.module), passes=passes).attach(graph.module)
    return guard_inputs(graph.module)


def _layers(graph: QuantGraph) -> Iterator[_Layer]:
    """Layers with a cache among the inputs, in the order in which the graph computes them."""
    for node in patterns.calls(graph, _SDPA, _ATTENTION):
        if node.target == _ATTENTION:
            keys, values = arguments(node)["k"], arguments(node)["v"]
        else:
            keys, values = (_joined(arguments(node)[name]) for name in ("key", "value"))
        for k, v in zip(keys, values, strict=False):
            if all(x.op == "placeholder" and patterns.only_user(x) is not None for x in (k, v)) and len(keys) == 2:
                rows = shape_of(arguments(node)["q" if node.target == _ATTENTION else "query"])
                new = next(x for x in keys if x is not k)
                if same(shape_of(new)[1:2], rows[1:2] if node.target == _ATTENTION else rows[2:3]):
                    yield _Layer(node, k, v)


def _joined(operand: fx.Node) -> list[fx.Node]:
    """What an operand of attention [B, heads, L, head_dim] is joined from along the tokens, or nothing."""
    steps = list(patterns.back(operand, frozenset({ATEN.transpose.int, ATEN.permute.default, ATEN.contiguous.default})))
    cat = steps[-1]
    if not is_call(cat, ATEN.cat.default) or any(patterns.only_user(step) is None for step in steps):
        return []
    return list(arguments(cat)["tensors"]) if arguments(cat)["dim"] in (1, -3) else []


def _rewrite(graph: QuantGraph, policy: CachePolicy, layers: list[_Layer]) -> int:
    module, made = graph.module, _Inputs(value_of(layers[0].keys))
    old = module.graph.find_nodes(op="placeholder")
    rules = rules_of(module)
    replaced: dict[fx.Node, _Parts] = {}
    tables: list[fx.Node] = []
    count = 0
    for i, layer in enumerate(layers):
        codecs = policy.codec("keys", i), policy.codec("values", i)
        if codecs == (None, None):
            continue
        count += 1
        tokens = _tokens(layer) * policy.span
        tables = tables or made.tables(old[-1], shape_of(layer.keys)[3], tokens)
        replaced[layer.keys] = made.prefix(layer.keys, codecs[0], "keys", tokens)
        replaced[layer.values] = made.prefix(layer.values, codecs[1], "values", tokens)
        _replace_attention(graph, layer, replaced, tables, codecs_text(*codecs), tokens)
    if not count:
        raise Unfit(f"the policy encodes none of its {len(layers)} layers")
    for node in replaced:
        if node.users:
            raise Unfit(f"{node.name} is also read by {next(iter(node.users)).name}")
    _set_inputs(graph, old, replaced, tables, () if rules is None else rules.conditions)
    return count


def _tokens(layer: _Layer) -> int:
    """Tokens of a chunk: those that a call brings."""
    node = layer.attention
    rows = shape_of(arguments(node)["q"])[1] if node.target == _ATTENTION else shape_of(arguments(node)["query"])[2]
    if not isinstance(rows, int):
        raise Unfit("the number of tokens of a call varies: capture the model for frames of one size")
    return rows


def _replace_attention(
    graph: QuantGraph,
    layer: _Layer,
    replaced: _Replaced,
    tables: list[fx.Node],
    codec: str,
    span: int,
) -> None:
    node = layer.attention
    if node.target == _SDPA:
        before = set(patterns.calls(graph, _ATTENTION))
        fuse_attention.fuse(graph, node)
        (node,) = set(patterns.calls(graph, _ATTENTION)) - before
    named = arguments(node)

    def pieces(name: str, old: fx.Node) -> list[fx.Node]:
        parts = replaced[old]
        return [parts.sink, parts.recent, *(piece for piece in named[name] if piece is not old)]

    stored = [list(replaced[old].packed.values()) for old in (layer.keys, layer.values)]
    args = (named["q"], pieces("k", layer.keys), pieces("v", layer.values), *stored, *tables, codec, span)
    edits.check_fits(graph, kernels.attention_packed, args)
    packed = edits.insert(node, node, kernels.attention_packed.definition, args, value_of(node))
    node.replace_all_uses_with(packed)
    edits.erase_unread(node)


class _Inputs:
    """Makes inputs whose sizes vary as those of an input that is there."""

    def __init__(self, like: Tensor) -> None:
        if not isinstance(like, FakeTensor):
            raise Unfit(
                "the graph has no recorded values: load its bundle with this version of fxq, or capture it again"
            )
        self.mode = like.fake_mode
        self.env: ShapeEnv = self.mode.shape_env or ShapeEnv()
        self.like = like
        self.spans: _Size = 0
        self.encoded: _Size = 0

    def _size(self, name: str, hint: int) -> torch.SymInt:
        """A size that may vary."""
        from torch._dynamo.source import ConstantSource  # Dynamo takes a second to import

        source = ConstantSource(f"__packed_{name}")
        symbol = self.env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        size = self.env.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        return size

    def _input(self, before: fx.Node, name: str, shape: tuple[_Size, ...], dtype: torch.dtype) -> fx.Node:
        with self.mode:
            value = torch.empty(shape, dtype=dtype, device=self.like.device)
        with before.graph.inserting_before(before):
            node = before.graph.placeholder(name)
        inherit_meta(node, before, value)
        return node

    def tables(self, last: fx.Node, head_dim: int, span: int) -> list[fx.Node]:
        """Those of the encoded tokens, behind the last input."""
        self.spans, self.encoded = self._size("spans", 2), self._size("tokens", 2 * span)
        after = last.next
        return [self._input(after, name, (self.encoded, head_dim // 2), torch.float32) for name in TABLES]

    def prefix(self, old: fx.Node, codec: Codec | None, kind: Kind, span: int) -> _Parts:
        """Inputs in the place of one with dense keys or values [B, L, heads, head_dim]."""
        batch, _, heads, width = shape_of(old)
        dtype = value_of(old).dtype

        def exact(name: str, tokens: _Size) -> fx.Node:
            return self._input(old, f"{old.name}_{name}", (batch, tokens, heads, width), dtype)

        def stored(field: Field) -> fx.Node:
            lead = (batch, self.spans * span if field.per == "token" else self.spans)[: LEADING_AXES[field.per]]
            return self._input(old, f"{old.name}_{field.name}", (*lead, *field.shape), field.dtype)

        sink = exact("sink", self._size(f"{old.name}_sink", 2))
        if codec is None:
            packed = {"exact": exact("exact", self.encoded)}
        else:
            packed = {field.name: stored(field) for field in codec.fields(Shape(heads, width, span), kind)}
        return _Parts(sink, packed, exact("recent", self._size(f"{old.name}_recent", 3)))


def _set_inputs(
    graph: QuantGraph,
    old: list[fx.Node],
    replaced: _Replaced,
    tables: list[fx.Node],
    conditions: tuple[Expression, ...],
) -> None:
    """Erase the inputs that were replaced, and say how the graph is called now."""
    module = graph.module
    names, spec = convention(module)
    leaves = [replaced[node]._asdict() if node in replaced else node for node in old]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    if kwargs:
        kwargs |= dict(zip(TABLES, tables, strict=True))
    else:
        args = (*args, *tables)
    for node in replaced:
        module.graph.erase_node(node)
    inputs = module.graph.find_nodes(op="placeholder")
    if inputs != pytree.tree_leaves((args, kwargs)):
        raise Unfit("its inputs have the names of others")
    place = {node: number for number, node in enumerate(inputs)}
    moved = [_moved(condition, old, place, replaced, tables[0]) for condition in conditions]
    rules = call_rules(module, moved)
    set_convention(module, [*names, *TABLES], pytree.tree_structure((args, kwargs)), rules)
    if isinstance(facts := module_note(module), Facts):
        now = dataclasses.replace(facts, inputs=rules.sizes, dtypes=rules.dtypes, conditions=rules.conditions)
        now.attach(module)


def _moved(
    condition: Expression,
    old: list[fx.Node],
    place: Mapping[fx.Node, int],
    replaced: _Replaced,
    table: fx.Node,
) -> Expression:
    """A condition on the old inputs, said of the new ones: the parts of a cache together are as long as it was."""
    if not isinstance(condition, list):
        return condition
    name, *operands = condition
    if name not in ("size", "value"):
        return [name, *(_moved(operand, old, place, replaced, table) for operand in operands)]
    node = old[operands[0]]
    if node not in replaced:
        return [name, place[node], *operands[1:]]
    sink, recent = place[replaced[node].sink], place[replaced[node].recent]
    if operands[1] != 1:
        return [name, sink, operands[1]]
    return ["+", ["+", ["size", sink, 1], ["size", place[table], 0]], ["size", recent, 1]]
