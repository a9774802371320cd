"""Rewrite: attentions in 8 bits that the exact one computes faster on this machine become exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from fxq import kernels
from fxq.core.facts import ATTENTION, ChosenAttentions, Facts, has_facts
from fxq.core.graph import arguments
from fxq.core.ir import QuantGraph, example_value
from fxq.core.pipeline import Fusion
from fxq.core.signature import hint_of
from fxq.passes.fusions.fuse_attention import place_of
from fxq.passes.kernel_times import seconds_in_turns
from fxq.passes.match import patterns
from fxq.passes.measured.kept_times import KEPT, Times, note_trouble, power_of_two

MOST_QUERIES, MOST_KEYS, MOST_HEADS = 1024, 4096, 4
"""That are measured: the time of a query, of a key and of a head are the same in larger calls."""
_UNKNOWN = "attention in 8 bits: how many tokens it has depends on the data: not measured"


@dataclasses.dataclass(frozen=True)
class AttentionSize:
    """What the time of an attention is measured for.

    Attributes:
        queries: of a call.
        keys: in all pieces.
        pieces: 1, or 2 for more.
        heads: of all videos together.
        head_dim: channels of a head.
        dtype: of queries, keys and values.
        device: where it runs, as "cpu".
        scheme: of the attention in 8 bits.
    """

    queries: int
    keys: int
    pieces: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    scheme: str = "int8"


@dataclasses.dataclass(frozen=True)
class ExactWhereFaster(Fusion):
    """Leaves no attention in 8 bits where the exact one takes less time on this machine, at the captured sizes.

    Both are measured in turns on random numbers, once on a machine for each size (to the nearest power of two, up to
    MOST_QUERIES queries, MOST_KEYS keys and MOST_HEADS heads, or one for each thread), dtype and number of threads
    (:mod:`~fxq.passes.measured.kept_times`). An attention that becomes exact tells both times as its reason among those
    of :class:`~fxq.core.facts.ChosenAttentions`, one that stays in a remark. One of which a call would save ``least``
    seconds or less stays.
    """

    least: float = 0.0

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of attentions that become exact."""
        nodes = patterns.calls(graph, *(op.definition for op in kernels.ATTENTIONS.values()))
        reasons: dict[int, str] = {}
        tensors = (*graph.module.parameters(), *graph.module.buffers())
        device = str(tensors[0].device) if tensors else "cpu"
        for number, node in enumerate(nodes):
            exact, told = _judged(node, device, self.least)
            if exact:
                reasons[number] = told
                node.target = kernels.attention.definition
            else:
                graph.note(place_of(node), told)
        if reasons and not _told(graph, reasons, len(nodes)):
            for number, text in reasons.items():
                graph.note(place_of(nodes[number]), f"exact attention: {text}")
        note_trouble(graph)
        return len(reasons)


def _judged(node: fx.Node, device: str, least: float) -> tuple[bool, str]:
    """Whether the exact attention wins, and the two times, or why there are none."""
    named = arguments(node)
    try:
        size = _size(named["q"], named["k"], device, _scheme(node))
    except ValueError:
        return False, _UNKNOWN
    try:
        integers, exact = _measured(size)
    except (RuntimeError, MemoryError) as error:
        return False, f"attention in 8 bits: could not be measured ({str(error).splitlines()[0]})"
    times = f"{1e3 * exact:.3g} ms exact, {1e3 * integers:.3g} ms in 8 bits, as measured here"
    times += f" for {size.queries} queries and {size.keys} keys of {size.heads} heads"
    wins = exact < integers - least
    return wins, times if wins else f"attention in 8 bits: {times}"


def _scheme(node: fx.Node) -> str:
    return next(scheme for scheme, op in kernels.ATTENTIONS.items() if op.definition == node.target)


def _size(q: fx.Node, k: Sequence[fx.Node], device: str, scheme: str) -> AttentionSize:
    """The size that is measured for a call.

    Raises:
        ValueError: when a number of tokens depends on data.
    """
    value = example_value(q)
    batch, queries, heads, head_dim = (hint_of(length) for length in value.shape)
    lengths = [length for piece in k if (length := hint_of(example_value(piece).shape[1]))]
    return AttentionSize(
        queries=min(MOST_QUERIES, power_of_two(queries)),
        keys=min(MOST_KEYS, power_of_two(sum(lengths))),
        pieces=min(2, max(1, len(lengths))),
        heads=min(batch * heads, max(MOST_HEADS, torch.get_num_threads())),
        head_dim=head_dim,
        dtype=value.dtype,
        device=device,
        scheme=scheme,
    )


def _measured(size: AttentionSize) -> Times:
    """Seconds of one call in 8 bits, and of the exact one."""
    known = dataclasses.asdict(size)
    what = " ".join(f"{name}={value}" for name, value in known.items() if name != "device")
    return KEPT.of(f"attention {what}", size.device, lambda: attention_seconds(size))


def attention_seconds(size: AttentionSize) -> Times:
    """Seconds of one call in 8 bits and of the exact one: medians of rounds in which they take turns."""
    random = torch.Generator().manual_seed(0)

    def normal(tokens: int) -> torch.Tensor:
        shape = 1, tokens, size.heads, size.head_dim
        return torch.randn(shape, generator=random, dtype=torch.float32).to(size.device, size.dtype)

    newest = size.keys // 4 if size.pieces > 1 else 0
    lengths = [size.keys - newest, newest] if newest else [size.keys]
    q, k, v = normal(size.queries), [normal(n) for n in lengths], [normal(n) for n in lengths]
    calls = [lambda: kernels.ATTENTIONS[size.scheme](q, k, v), lambda: kernels.attention(q, k, v)]
    integers, exact = seconds_in_turns(calls, size.device)
    return integers, exact


def _told(graph: QuantGraph, reasons: dict[int, str], count: int) -> bool:
    """Write why attentions are exact among what became of all, in their order; False where the graph has others."""
    facts = dict(Facts.of(graph.module).others) if has_facts(graph.module) else {}
    chosen = ChosenAttentions.of(facts | graph.found)
    if chosen is None or len(chosen.integers) != count:
        return False
    numbers = iter(range(count))
    layers = tuple(
        layer if layer.reason else dataclasses.replace(layer, reason=reasons.get(next(numbers), ""))
        for layer in chosen.layers
    )
    graph.found[ATTENTION] = dataclasses.replace(chosen, layers=layers).to_json()
    return True
