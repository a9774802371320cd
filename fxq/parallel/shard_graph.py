"""Rewrite: a rank's part of a frozen graph, with the sums over ranks that it needs."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from fxq.core.graph import arguments, drop_unread_attributes, set_arguments
from fxq.core.ir import (
    LayerPlan,
    QuantGraph,
    Stage,
    example_value,
    get_tensor,
    inherit_meta,
    planned,
    put_tensor,
    set_plan,
    stored_names,
)
from fxq.core.layer import FROZEN_PRODUCTS, measured_pair, told_in_graph
from fxq.core.pipeline import Rewrite
from fxq.export.inputs import InputEntry, input_entries, record_values
from fxq.parallel.axes import Splits, check_mixing, check_readers, find_splits, joins, quantize_before
from fxq.parallel.groups import Place
from fxq.parallel.layers import LayerShard, Sliceable, bounds, shard_column, shard_row
from fxq.parallel.plan import ParallelError, ShardPlan
from fxq.passes.match.edits import erase_unread, insert
from fxq.passes.match.patterns import ATEN, is_call

_C10D = torch.ops._c10d_functional
_MEANS = (ATEN.mean.dim, ATEN.sum.dim_IntList)
_SIZED = (ATEN.view.default, ATEN.reshape.default, ATEN._unsafe_view.default, ATEN.expand.default)


class Source(Protocol):
    """Where the tensors of the whole graph are."""

    def whole(self, name: str) -> Tensor:
        """A tensor."""

    def part(self, name: str) -> Sliceable:
        """A tensor that is read where it is sliced."""


@dataclasses.dataclass(frozen=True)
class ShardGraph(Rewrite):
    """Splits linears and all that lies between them as ``plan`` says; the graph becomes that of one rank.

    1. A column layer keeps the rank's outputs; norms, rotary embeddings, attention and caches go on with the rank's
    channels and heads. 2. A row layer keeps the rank's inputs, gives float32, and the ranks' results are summed. 3. A
    mean or sum over split channels (the norm of queries and keys over all heads) is summed over ranks.

    """

    plan: ShardPlan
    place: Place
    source: Source
    needs: ClassVar[Stage] = Stage.FROZEN
    gives: ClassVar[Stage] = Stage.FROZEN
    repeatable: ClassVar[bool] = True

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers split.

        Raises:
            ParallelError: when the plan does not fit the graph or the number of ranks.
        """
        layers = planned(graph.module)
        if reason := told_in_graph((plan for plan, _ in layers.values()), "a split over ranks"):
            raise ParallelError(reason)
        self.plan.check_patterns(layers)
        how = {name: kind for name in layers if (kind := self.plan.how(name)) != "replicate"}
        _refuse_float8(layers[name][0] for name in how)
        sites = [(node, name) for name in how for node in layers[name][1]]
        entries = input_entries(graph.module)
        if entries is None:
            raise ParallelError("the module carries no example values: load it from a bundle that states its inputs")
        splits = find_splits(graph.module, {node: n for node, n in sites if how[n] == "column"}, self.place.size)
        check_mixing(graph.module, splits)
        check_readers(graph.module, splits, {node: name for node, name in sites if how[name] == "row"})
        for node in list(graph.module.graph.nodes):
            self._adapt(node, splits)
        shards = {name: self._shard(layers[name][0], how[name]) for name in how}
        for node, name in sites:
            set_plan(node, shards[name].plan)
            if how[name] == "row":
                self._sum(node, shards[name])
        drop_unread_attributes(graph.module.graph)
        self._store(graph.module, splits, shards)
        self._record(graph.module, splits, entries)
        return len(shards)

    def _adapt(self, node: fx.Node, splits: Splits) -> None:
        """Sizes and sums of what lies between the linears."""
        if is_call(node, *_SIZED, ATEN.unflatten.int) and node in splits:
            _resize(node, splits[node].dim, self.place.size)
        elif is_call(node, *_MEANS) and joins(node, splits):
            total = self._all_reduce(node)
            if is_call(node, ATEN.mean.dim):
                _follow(total, ATEN.div.Tensor, (total, self.place.size))
        elif is_call(node, ATEN.rms_norm.default) and joins(node, splits):
            self._split_norm(node)

    def _all_reduce(self, node: fx.Node) -> fx.Node:
        """The sum of a value over ranks, in its place."""
        return _follow(
            _follow(node, _C10D.all_reduce.default, (node, "sum", self.place.group)), _C10D.wait_tensor.default
        )

    def _split_norm(self, node: fx.Node) -> None:
        """``rms_norm`` over all channels of all ranks, in float32."""
        named = arguments(node)
        x, weight, eps = named["input"], named["weight"], named["eps"]
        dtype = example_value(node).dtype
        eps = torch.finfo(dtype).eps if eps is None else eps

        def call(target: Callable[..., object], *args: Argument) -> fx.Node:
            return insert(node, node, target, args, example_value(node))

        wide = call(ATEN.to.dtype, x, torch.float32)
        mean = call(ATEN.mean.dim, call(ATEN.pow.Tensor_Scalar, wide, 2), [-1], True)
        total = call(_C10D.wait_tensor.default, call(_C10D.all_reduce.default, mean, "sum", self.place.group))
        scale = call(ATEN.rsqrt.default, call(ATEN.add.Tensor, call(ATEN.div.Tensor, total, self.place.size), eps))
        result = call(ATEN.mul.Tensor, wide, scale)
        if weight is not None:
            result = call(ATEN.mul.Tensor, result, weight)
        node.replace_all_uses_with(call(ATEN.to.dtype, result, dtype))
        node.graph.erase_node(node)

    def _shard(self, plan: LayerPlan, how: str) -> LayerShard:
        """The rank's part of a layer; of one in model dtype only the plan, its tensors are split like the graph's."""
        if plan.scheme is not None:
            tensors = {name: self.source.part(f"{plan.layer}.{name}") for name in stored_names(plan)}
            return (shard_column if how == "column" else shard_row)(plan, tensors, self.place.rank, self.place.size)
        field = "out_features" if how == "column" else "in_features"
        return LayerShard(dataclasses.replace(plan, **{field: getattr(plan, field) // self.place.size}), {})

    def _sum(self, node: fx.Node, shard: LayerShard) -> None:
        """A row layer on the rank's inputs, summed over ranks in float32."""
        dtype = example_value(node).dtype
        bias = None
        if is_call(node, *FROZEN_PRODUCTS):
            _narrow(node, shard)
        else:
            bias = arguments(node)["bias"]
            set_arguments(node, bias=None)
            node = node if dtype == torch.float32 else _follow(node, ATEN.to.dtype, (node, torch.float32))
        total = self._all_reduce(node)
        if dtype != torch.float32:
            total = _follow(total, ATEN.to.dtype, (total, dtype))
        if bias is not None:
            _follow(total, ATEN.add.Tensor, (total, bias))

    def _store(self, module: fx.GraphModule, splits: Splits, shards: Mapping[str, LayerShard]) -> None:
        names = sorted({str(node.target) for node in module.graph.find_nodes(op="get_attr")})
        for name in names:
            layer, _, leaf = name.rpartition(".")
            if layer in shards and leaf in shards[layer].tensors:
                tensor = shards[layer].tensors[leaf]
            elif name in splits:
                tensor = self._part(name, splits[name].dim, module)
            else:
                tensor = self.source.whole(name)
            put_tensor(module, name, tensor)

    def _part(self, name: str, dim: int, module: fx.GraphModule) -> Tensor:
        """The rank's part of a tensor that has the layout of the graph's values, such as the weight of a norm."""
        low, high = bounds(get_tensor(module, name).shape[dim], self.place.rank, self.place.size, None, name)
        part = self.source.part(name)[(*[slice(None)] * dim, slice(low, high))]
        return part.detach().clone(memory_format=torch.contiguous_format)

    def _record(self, module: fx.GraphModule, splits: Splits, entries: Sequence[InputEntry]) -> None:
        """Record the values of the rank's graph."""
        inputs, local = module.graph.find_nodes(op="placeholder"), []
        for node, entry in zip(inputs, entries, strict=True):
            if node in splits:
                entry = dataclasses.replace(
                    entry,
                    sizes=_divide(entry.sizes, splits[node].dim, self.place.size),
                    example=_divide(entry.example, splits[node].dim, self.place.size),
                )
            local.append(entry)
        device = next(v.device for node in inputs if isinstance(v := example_value(node), Tensor))
        if not record_values(module, local, device):
            raise ParallelError("the rank's graph does not run on example values: a reshape names a size of the whole")


def _refuse_float8(plans: Iterable[LayerPlan]) -> None:
    for plan in plans:
        if plan.scheme is not None and plan.scheme.is_float8:
            raise ParallelError(
                f"layer {plan.layer} is {plan.scheme.format}: only integers are split over ranks. Replicate it by a "
                "rule of the shard plan, or quantize with w8a8 or w8a8-dynamic"
            )


def _divide(sizes: Sequence[Any], dim: int, size: int) -> tuple[Any, ...]:
    return tuple(n // size if i == dim else n for i, n in enumerate(sizes))


def _follow(node: fx.Node, target: Callable[..., object], args: tuple[Argument, ...] | None = None) -> fx.Node:
    """A call right behind a value (on it alone by default) that takes its place."""
    users = list(node.users)
    new = insert(node.next, node, target, (node,) if args is None else args, example_value(node))
    for user in users:
        user.replace_input_with(node, new)
    return new


def _resize(node: fx.Node, dim: int, size: int) -> None:
    """Sizes that a reshape names are the rank's."""
    named = arguments(node)
    start = 0
    if is_call(node, ATEN.unflatten.int):
        start = named["dim"] % (len(example_value(node).shape) - len(named["sizes"]) + 1)
    sizes = list(named["sizes"] if "sizes" in named else named["size"] if "size" in named else named["shape"])
    place = dim - start
    if 0 <= place < len(sizes) and isinstance(sizes[place], int) and sizes[place] != -1:
        sizes[place] //= size
        set_arguments(node, **{next(n for n in ("sizes", "size", "shape") if n in named): sizes})


def _narrow(node: fx.Node, shard: LayerShard) -> None:
    """A quantized row layer on the rank's channels, with a float32 result."""
    old, split = quantize_before(node), shard.plan.split
    named = arguments(old) | {"split": split}
    if shard.filled:
        perm = _read(f"{shard.plan.layer}.perm", old)
        # Not a pad: its shape rule fixes every size of the input.
        args = (named["x"], -1, perm)
        named |= {"x": insert(old, old, ATEN.index_select.default, args, example_value(old)), "perm": None}
    elif "perm" not in shard.tensors:
        named["perm"] = None
    new = insert(old, old, old.target, tuple(named.values()), example_value(old))  # type: ignore[arg-type]
    before, measured = arguments(node), [name for name, read in arguments(node).items() if measured_pair(read)]
    parts = {name: insert(old, old, operator.getitem, (new, i), None) for i, name in enumerate(measured)}
    set_arguments(node, **({"q": new} | parts), split=split, dtype=torch.float32)
    erase_unread(*(before[name] for name in measured or ("q",)))


def _read(name: str, before: fx.Node) -> fx.Node:
    with before.graph.inserting_before(before):
        node = before.graph.create_node("get_attr", name)
    inherit_meta(node, before, None)
    return node
