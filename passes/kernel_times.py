"""How long the kernels of a linear take on this machine, by the width of its weights."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxq.core.graph import LinearSite
from fxq.core.ir import LayerPlan, QuantGraph, example_value
from fxq.core.method import Scheme
from fxq.core.signature import hint_of
from fxq.kernels import (
    dual_scale_linear,
    dual_scale_linear_per_token,
    native,
    quantize_act,
    quantize_per_token,
    quantize_per_token_asymmetric,
)
from fxq.kernels.arguments import Quantization, QuantizePerToken
from fxq.kernels.gemm.op import sample_operands
from fxq.passes.apply_methods import group_order
from fxq.runtime.timing import clock_for, interleave, repeats

Arguments = TypeVar("Arguments")
_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class LinearSize:
    """What the time of a linear depends on beside its scheme.

    Attributes:
        rows: of one call.
        inputs: K.
        outputs: N.
        split: number of normal channels; K where there is one group.
        dtype: of input and result.
        device: where it runs, as "cpu".
        bias: whether the linear in floats adds one, which takes time; integers always do.
    """

    rows: int
    inputs: int
    outputs: int
    split: int
    dtype: torch.dtype
    device: str
    bias: bool = True


def kernel_seconds(size: LinearSize, schemes: Sequence[Scheme | None]) -> list[float]:
    """Seconds of one call under each scheme, quantizing the input included; None: the linear in the input's dtype.

    Medians of five rounds in which all of them take turns, on random numbers, with as many threads as torch has.
    Weights are bell-shaped and lie as :func:`fxq.optimize` lays them out.

    Raises:
        ValueError: for a scheme of float8.
    """
    return seconds_in_turns(kernel_calls(size, schemes), size.device)


def kernel_calls(size: LinearSize, schemes: Sequence[Scheme | None]) -> list[Callable[[], object]]:
    """What :func:`kernel_seconds` times: each returns the result [rows, outputs].

    Raises:
        ValueError: for a scheme of float8.
    """
    random = torch.Generator().manual_seed(0)
    return [_call(size, scheme, random) for scheme in schemes]


def seconds_in_turns(ways: Sequence[Callable[[], object]], device: str) -> list[float]:
    """Seconds of each of several calls: medians of five rounds in which they take turns, without autograd.

    Raises:
        Exception: what the first of them raises that fails.
    """
    return [statistics.median(seconds) for seconds in rounds_in_turns(ways, device, _ROUNDS)]


def rounds_in_turns(ways: Sequence[Callable[[], object]], device: str, rounds: int) -> list[list[float]]:
    """Seconds of each of several calls in every round, in which they take turns, without autograd.

    Raises:
        Exception: what the first of them raises that fails.
    """
    calls = {str(i): way for i, way in enumerate(ways)}
    _, clock = clock_for(torch.get_num_threads(), device)
    with torch.no_grad():
        for call in calls.values():
            call()  # compiles
        counts = {name: repeats(call, clock) for name, call in calls.items()}
        timing = interleave(calls, rounds, clock, counts)
    if timing.failures:
        raise next(iter(timing.failures.values()))
    return [timing.seconds[name] for name in calls]


def _call(size: LinearSize, scheme: Scheme | None, random: torch.Generator) -> Callable[[], object]:
    x = torch.randn((size.rows, size.inputs), generator=random, dtype=torch.float32).to(size.device, size.dtype)
    if scheme is None:
        weight = torch.randn((size.outputs, size.inputs), generator=random, dtype=torch.float32)
        placed = weight.to(size.device, size.dtype)
        bias = torch.zeros(size.outputs, device=size.device, dtype=size.dtype) if size.bias else None
        return lambda: F.linear(x, placed, bias)
    if scheme.is_float8:
        raise ValueError(f"{scheme.format}: only the times of integers are measured")
    panels = size.device == "cpu" and size.dtype != torch.float16 and not native.why_not()
    shape, bits = (size.rows, size.inputs), scheme.integer_bits
    operands = _placed(sample_operands(shape, size.outputs, size.split, bits, random, panels, True), size.device)
    perm = _outlier_order(size, random) if size.split < size.inputs else None
    if scheme.per_token:
        quantize = quantize_per_token_asymmetric if scheme.asymmetric else quantize_per_token
        tokens = QuantizePerToken(x, perm, size.split, scheme.input_bits)
        stored = operands.weight, operands.weight_scale, operands.offset, size.split, bits, size.dtype

        def per_token() -> Tensor:
            return dual_scale_linear_per_token(*quantize(*tokens), *stored)

        return per_token
    zeros = torch.zeros(len(operands.input_scale), dtype=torch.int32, device=size.device)
    quantization = Quantization(perm, operands.input_scale, zeros, size.split, scheme.input_bits)

    def static() -> Tensor:
        return dual_scale_linear(*operands._replace(q=quantize_act(x, *quantization)), size.dtype)

    return static


def _outlier_order(size: LinearSize, random: torch.Generator) -> Tensor:
    """int32 [K] as layers have it, which kernels read in runs: normal channels ascending, then some outliers."""
    outliers = torch.randperm(size.inputs, generator=random)[size.split :].sort().values.tolist()
    plan = LayerPlan(layer="", in_features=size.inputs, out_features=size.outputs, outliers=tuple(outliers))
    return group_order(plan).to(size.device, torch.int32)


def _placed(arguments: Arguments, device: str) -> Arguments:
    moved: Arguments = pytree.tree_map_only(Tensor, lambda t: t.to(device), arguments)
    return moved


@dataclasses.dataclass(frozen=True)
class GroupTimes:
    """Measured seconds of one call of all layers of a group: of each candidate, and in model dtype."""

    seconds: list[list[float]]
    floats: list[float]

    @classmethod
    def of(
        cls,
        graph: QuantGraph,
        groups: Sequence[Sequence[LinearSite]],
        candidates: Sequence[Sequence[Mapping[str, LayerPlan]]],
    ) -> GroupTimes:
        """As the first rank measures them, each size and its schemes once."""
        own: dict[str, Tensor] = {}
        if graph.workers.rank == 0:
            known: dict[object, list[float]] = {}
            for i, (group, options) in enumerate(zip(groups, candidates, strict=True)):
                sums = [0.0] * (len(options) + 1)
                for site in group:
                    plans = [option[site.layer] for option in options]
                    size = _linear_size(graph, site, plans)
                    schemes = [plan.scheme for plan in plans]
                    key = size, *schemes
                    if key not in known:
                        known[key] = kernel_seconds(size, [*schemes, None])
                    sums = [a + b for a, b in zip(sums, known[key], strict=True)]
                own[str(i)] = torch.tensor(sums, dtype=torch.float64, device="cpu")
        shared = graph.workers.share(own, 0)
        rows = [shared[str(i)].tolist() for i in range(len(groups))]
        return cls([row[:-1] for row in rows], [row[-1] for row in rows])

    @property
    def in_floats(self) -> float:
        """Of all layers in model dtype."""
        return math.fsum(self.floats)


def _linear_size(graph: QuantGraph, site: LinearSite, plans: Sequence[LayerPlan]) -> LinearSize:
    source = site.node.args[0]
    assert isinstance(source, fx.Node)
    value = example_value(source)
    rows = math.prod(hint_of(size) for size in value.shape[:-1])
    split = min(plan.split for plan in plans)
    device = str(site.weight(graph.module).device)
    sizes = rows, plans[0].in_features, plans[0].out_features, split
    return LinearSize(*sizes, value.dtype, device, site.bias_name is not None)
