"""An encoded cache in a graph from a file: the tables that it holds, and inputs that codecs can read."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from fxq.cache.codecs.codec import Codec, Kind
from fxq.cache.codecs.record import Field, Shape
from fxq.cache.named import codecs_from_text
from fxq.cache.settings import CacheSettingsError, policy_from_json
from fxq.cache.tables import KINDS
from fxq.core.graph import arguments
from fxq.core.ir import get_tensor
from fxq.kernels import attention_packed

Sizes = tuple[int, ...]
"""Of an input of the captured call; empty where it is no tensor."""


MAX_VALUES = 2**22
"""Most numbers of an encoded cache that are made for a call: eight bytes each while they are."""


class EncodedError(ValueError):
    """A graph whose codecs lack tables, or hold some that they cannot work with."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Keys or values of one layer as a graph reads them.

    Args:
        codec: that stored them.
        kind: keys or values.
        shape: of the layer's cache.
        reads: what the call reads, one node for each field of the codec.
        fields: of the codec.
        call: name of the node.
    """

    codec: Codec
    kind: Kind
    shape: Shape
    reads: Sequence[fx.Node]
    fields: Sequence[Field]
    call: str

    @property
    def model_reads(self) -> dict[str, fx.Node]:
        """Of what lies with the model, by the names of the fields."""
        return {f.name: node for f, node in zip(self.fields, self.reads, strict=True) if f.per == "model"}


def packs(module: fx.GraphModule) -> bool:
    """Whether a graph reads an encoded cache."""
    return bool(module.graph.find_nodes(op="call_function", target=attention_packed.definition))


def encoded(module: fx.GraphModule, sizes: Sequence[Sizes]) -> Iterator[Encoded]:
    """The encoded keys and values that a graph reads, whose calls are known to fit their arguments.

    Args:
        module: the graph.
        sizes: of its inputs.

    Raises:
        EncodedError: when a call does not take its cache from the inputs, as every packed graph does.
    """
    inputs = dict(zip(module.graph.find_nodes(op="placeholder"), sizes, strict=True))
    for node in module.graph.find_nodes(op="call_function", target=attention_packed.definition):
        call: Mapping[str, Any] = arguments(node)
        if not all(isinstance(call[name], list | tuple) for name in ("k", "packed_k", "packed_v")):
            raise EncodedError(f"node {node.name}: what it reads is no list of tensors")
        if type(call["span"]) is not int:
            raise EncodedError(f"node {node.name}: its span is computed, expected a number")
        sink: Sizes = inputs.get(call["k"][0], ()) if call["k"] else ()
        if len(sink) != 4:
            raise EncodedError(f"node {node.name}: its first keys are no input of the graph")
        shape = Shape(*sink[2:], int(call["span"]))
        for kind, bound in zip(KINDS, codecs_from_text(str(call["codec"])), strict=True):
            if bound is not None:
                fields = bound.codec.fields(shape, kind)
                reads = call[f"packed_{kind[0]}"]
                yield Encoded(bound.codec, kind, shape, reads, fields, node.name)


def check_encoded(
    module: fx.GraphModule, sizes: Sequence[Sizes] | None, recipe: Mapping[str, object], *, values: bool = True
) -> None:
    """Check what a graph holds for its codecs, and that it is there where the recipe needs it.

    Args:
        module: the graph with its tensors, whose calls are known to fit their arguments.
        sizes: of its inputs; None where they are not known.
        recipe: of the module's facts.
        values: whether to look at the tensors' values too; without, they may be stand-ins.

    Raises:
        EncodedError: naming the node, or what to do.
    """
    try:
        policy = None if recipe.get("cache") is None else policy_from_json(recipe["cache"])
    except CacheSettingsError as error:
        raise EncodedError(f"facts.recipe: {error}") from None
    found = [] if sizes is None else list(encoded(module, sizes))
    learning = [item for item in found if item.codec.needs_tables]
    bare = [item for item in learning if any(node.op == "placeholder" for node in item.model_reads.values())]
    if policy is not None and policy.needs_tables and (bare or not learning):
        where = f"node {bare[0].call}, {bare[0].kind}: " if bare else ""
        raise EncodedError(
            f"{where}the recipe stores its cache by codecs with fit = 'model' and the bundle holds no tables of "
            "theirs: quantize again with this recipe, or give fxq.passes.pack_cache the tables"
        )
    for item in learning:
        reads = item.model_reads
        if all(node.op == "placeholder" for node in reads.values()):
            continue
        if any(node.op != "get_attr" for node in reads.values()):
            raise EncodedError(f"node {item.call}: its {item.kind} read tables that are neither stored nor inputs")
        tables: dict[str, Tensor] = {name: get_tensor(module, str(node.target)) for name, node in reads.items()}
        if values and (problem := item.codec.table_problem(tables, item.shape, item.kind)):
            raise EncodedError(f"node {item.call}, {item.kind}: codec {item.codec.name}: {problem}")


def seeded_cache(
    module: fx.GraphModule, sizes: Sequence[Sizes], seed: int, noise: Callable[[int, int], Tensor]
) -> dict[int, Tensor]:
    """Inputs that a graph's codecs can read, by position: what they could have stored.

    Args:
        module: the graph, whose calls are known to fit their arguments.
        sizes: of its inputs.
        seed: of the numbers.
        noise: gives so many float64 numbers in 0..1 for a seed, the same on every machine.

    Raises:
        EncodedError: when a call does not take its cache from the inputs, or what it takes has other sizes or is large.
    """
    positions = {node: i for i, node in enumerate(module.graph.find_nodes(op="placeholder"))}
    found: dict[int, Tensor] = {}
    values = 0
    for item in encoded(module, sizes):
        own = {f.name: (f, positions[n]) for f, n in zip(item.fields, item.reads, strict=True) if n in positions}
        leading = next(((f, sizes[at]) for f, at in own.values() if f.per in ("token", "span")), None)
        if leading is None or len(leading[1]) < 2:
            raise EncodedError(f"node {item.call}: its {item.kind} are no inputs of the graph")
        field, (batch, count, *_) = leading
        spans = count // (item.shape.span if field.per == "token" else 1)
        for one, at in own.values():
            if sizes[at] != one.size(batch, spans, item.shape.span):
                raise EncodedError(f"node {item.call}: {one.name} has the sizes {sizes[at]}")
        values += sum(math.prod(one.size(batch, spans, item.shape.span)) for one in item.fields)
        if values > MAX_VALUES:
            raise EncodedError(f"node {item.call}: the encoded cache has more than {MAX_VALUES} values")
        first = seed + 1009 * min(at for _, at in own.values())

        def numbers(name: str, shape: tuple[int, ...], first: int = first) -> Tensor:
            return noise(math.prod(shape), first + zlib.crc32(name.encode()) % 1009).view(shape)

        made = item.codec.seeded(item.shape, item.kind, batch, spans, numbers)
        found |= {at: made[name] for name, (_, at) in own.items()}
    return found
