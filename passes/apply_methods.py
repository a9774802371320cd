"""Analysis: run the recipe's methods layer by layer on the statistics and keep the integers they choose."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, fx

from fxq.calibration.collect import CalibrationError
from fxq.core.graph import LinearSite, linear_sites
from fxq.core.ir import LayerPlan, QuantGraph, Stage, planned, set_plan
from fxq.core.method import LayerProblem, LayerStatistics, LayerUpdate, Method, chooses, refuse_format
from fxq.core.pipeline import Analysis
from fxq.core.products import low_rank_branch
from fxq.core.rows import LEAST_GRADIENT, Moments, Weighting
from fxq.passes.methods import Units, output_sqnr
from fxq.passes.share_inputs import input_groups
from fxq.runtime.checkpoint import Checkpoint
from fxq.runtime.memory.residency import Residency, trim

_LEAST_OUTPUT = 2.0**-100  # in the range of float32 with room for the steps of integers, and for sums
_ROWS = 512  # rows that are put into order at a time
_MOST_GRADIENT = 200.0  # of the mean squared gradient; sums over all rows know no largest one


class Judge(Protocol):
    """Measures a group's result while its calibration rows are at hand."""

    def reads(self, graph: QuantGraph, layer: str) -> tuple[Tensor, ...]:
        """What it reads of a layer beside the problem; checkpoints of other values do not count."""

    def judge(
        self, problem: LayerProblem, update: LayerUpdate, sizes: list[int], reads: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """Tensors by name, of a problem of stacked layers with ``sizes`` outputs."""


def group_order(plan: LayerPlan) -> Tensor:
    """Permutation int64 [K] that puts normal channels first and outliers last, each ascending."""
    outliers = torch.tensor(plan.outliers, dtype=torch.int64, device="cpu")
    normal = torch.ones(plan.in_features, dtype=torch.bool, device="cpu")
    normal[outliers] = False
    return torch.cat((normal.nonzero().flatten(), outliers))


@dataclasses.dataclass(frozen=True)
class ApplyMethods(Analysis):
    """Fills ``graph.updates`` and each plan's output SQNR.

    With a ``checkpoint`` every finished layer is one file; a rerun with the same layer, data and settings reads it
    instead of working again, and integers stay in the file until they are used. ``on_layer`` is told (layer, done,
    total). With ``share_inputs`` layers that read the same input (:func:`~fxq.passes.share_inputs.input_groups`) are
    one problem of stacked weights on the first one's rows: their input scales are equal, whatever the methods do, and
    a checkpoint holds all of them. The graph's ranks divide the problems among them.
    """

    methods: tuple[Method, ...]
    weighting: Weighting = Weighting.SENSITIVITY
    seed: int = 0
    checkpoint: Checkpoint | None = None
    on_layer: Callable[[str, int, int], None] | None = None
    share_inputs: bool = False
    needs: ClassVar[Stage] = Stage.CALIBRATED
    gives: ClassVar[Stage] = Stage.CALIBRATED

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers worked on.

        Raises:
            ValueError: when there is no method, or gradients are asked for that calibration did not measure.
            fxq.runtime.workers.WorkerError: when a rank is gone.
        """
        if not self.methods:
            raise ValueError("the recipe has no method; RangeSearch() or MinMax() is the least")
        groups = self.groups(graph)
        plans = graph.quantized_plans
        owners = graph.owners([plans[site.layer] for site in group] for group in groups)
        mine = [group for group, owner in zip(groups, owners, strict=True) if owner == graph.workers.rank]
        solved, done, total = {}, 0, sum(map(len, mine))
        for group in mine:
            if self.on_layer is not None:
                self.on_layer(group[0].layer, done, total)
            solved[group[0].layer] = self.solve(graph, group, plans)
            done += len(group)
        if self.on_layer is not None and total:
            self.on_layer("", total, total)
        notes = planned(graph.module)
        for group, owner in zip(groups, owners, strict=True):
            self.record(graph, group, notes, graph.workers.share(solved.pop(group[0].layer, None), owner))
        return len(plans)

    def groups(self, graph: QuantGraph) -> list[list[LinearSite]]:
        """Layers to be quantized, in graph order, each with those that are solved with it."""
        plans = graph.quantized_plans
        sites = {site.layer: site for site in linear_sites(graph.module)}
        groups = {layer: [sites[layer]] for layer in plans}
        for group in input_groups(graph.module) if self.share_inputs else []:
            first, *others = (site.layer for site in group)
            if all(plans[layer].outliers == plans[first].outliers for layer in others):
                groups[first] = group
                for layer in others:
                    del groups[layer]
        return list(groups.values())

    def solve(
        self, graph: QuantGraph, group: list[LinearSite], plans: dict[str, LayerPlan], judge: Judge | None = None
    ) -> dict[str, Tensor]:
        """Integers and scales of each layer of a group, by its number, and their quality.

        Args:
            graph: CALIBRATED.
            group: one of :meth:`groups`.
            plans: by layer; what is asked of the group need not be what the graph's notes say.
            judge: what else is to be known of the result; its tensors are added to it, and a checkpoint of it has a
                file of its own.
        """
        residency = Residency()
        problems: list[LayerProblem] = []
        for site in group:
            problems.append(self._problem(graph, site, plans[site.layer], problems[:1]))
        if (statistics := graph.statistics.get(group[0].layer)) is not None:
            sums = () if statistics.sums is None else (statistics.sums.squares,)
            residency.give_back(statistics.rows, *sums)
        for problem, site in zip(problems, group, strict=True):
            _check_range(problem, site.weight(graph.module).dtype)
        joint = _stacked(problems)
        refuse_format(joint.layer, joint.scheme, self.methods)
        judged = () if judge is None else judge.reads(graph, group[0].layer)
        key = _key(joint, self.methods, judged) if self.checkpoint is not None else ""
        name = joint.layer if judge is None else f"{joint.layer} {joint.scheme.label}"
        tensors = None if self.checkpoint is None else self.checkpoint.read(name, key)
        if tensors is None:
            update: LayerUpdate | None = None
            for method in self.methods:
                if chooses(method, joint.scheme):
                    update = method.apply(joint, update)
            assert update is not None
            joint.cache.clear()  # what methods keep for one another is the most that there is
            parts = _split(update, [len(problem.weight) for problem in problems])
            quality = [_quality(problem, part) for problem, part in zip(problems, parts, strict=True)]
            tensors = _to_tensors(parts) | {"output_sqnr": torch.tensor(quality, dtype=torch.float64, device="cpu")}
            if judge is not None:
                tensors |= judge.judge(joint, update, [len(problem.weight) for problem in problems], judged)
            if self.checkpoint is not None:
                tensors = self.checkpoint.write(name, key, tensors)
        residency.give_back(*(site.weight(graph.module) for site in group), *tensors.values())
        del problems, joint
        trim()
        return tensors

    def record(
        self,
        graph: QuantGraph,
        group: list[LinearSite],
        notes: dict[str, tuple[LayerPlan, list[fx.Node]]],
        tensors: dict[str, Tensor],
    ) -> None:
        """Write what :meth:`solve` found for a group into the graph's updates and, with ``notes``, its plans."""
        for i, (site, sqnr) in enumerate(zip(group, tensors["output_sqnr"].tolist(), strict=True)):
            graph.updates[site.layer] = _from_tensors(tensors, i)
            plan, nodes = notes[site.layer]
            for node in nodes:
                set_plan(node, dataclasses.replace(plan, output_sqnr=None if math.isnan(sqnr) else sqnr))

    def _problem(
        self, graph: QuantGraph, site: LinearSite, plan: LayerPlan, known: Sequence[LayerProblem] = ()
    ) -> LayerProblem:
        """The problem of a layer; rows of the one that is ``known`` of its group are not copied again."""
        order = group_order(plan)
        stored = site.weight(graph.module)
        weight, device = stored.float()[:, order.to(stored.device)], stored.device
        statistics = graph.statistics.get(plan.layer) or _no_data(plan.in_features)
        weights = self.weighting.in_layer(graph.chunk_weights, len(plan.outliers))
        chunk = statistics.chunks.clamp(max=len(weights) - 1)
        row_weights, counts, bias = weights[chunk].float(), statistics.weights, site.bias(graph.module)
        if counts is not None and len(counts):
            row_weights = row_weights * (counts / counts.mean())
        if self.weighting is Weighting.GRADIENT and len(statistics.rows):
            if statistics.gradients is None:
                raise ValueError(f"layer {plan.layer} was calibrated without gradients, and the weighting needs them")
            most = _MOST_GRADIENT if statistics.sums is None else math.inf
            row_weights = row_weights * _relative(statistics.gradients, counts, most)
        shared = [p for p in known if graph.statistics.get(p.layer) is statistics]
        branch = low_rank_branch(graph.module, plan)
        return LayerProblem(
            layer=plan.layer,
            weight=weight,
            low=statistics.low[order].to(device),
            high=statistics.high[order].to(device),
            rows=shared[0].rows if shared else _ordered_rows(statistics, order).to(device),
            row_weights=row_weights.to(device),
            scheme=plan.quantization,
            split=plan.split,
            seed=self.seed,
            counts=None if counts is None else counts.to(device),
            bias=None if bias is None else bias.float().to(device),
            branch=None if branch is None else branch[:, order.to(device)],
            moments=shared[0].moments if shared else self._moments(statistics, order, device),
        )

    def _moments(self, statistics: LayerStatistics, order: Tensor, device: torch.device) -> Moments | None:
        """Of all rows as they are weighed, channels in ``order``; None where only a sample is known."""
        if statistics.sums is None:
            return None
        found = statistics.sums.moments(self.weighting is Weighting.GRADIENT)
        return found.of_channels(order.to(found.mean.device), statistics.multiplier).to(device)


def _ordered_rows(statistics: LayerStatistics, order: Tensor) -> Tensor:
    """float32 [R, K]: the sampled rows with channels in ``order``, made without a second copy of all of them."""
    rows = statistics.rows
    found = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for out, part in zip(found.split(_ROWS), rows.split(_ROWS), strict=True):
        values = part.float() if statistics.multiplier is None else part.float() * statistics.multiplier
        torch.index_select(values, 1, order.to(rows.device), out=out)
    return found


def _check_range(problem: LayerProblem, dtype: torch.dtype) -> None:
    """Refuse a layer of a float64 model whose outputs float32, in which integers are scaled, does not hold.

    Raises:
        CalibrationError: naming it, and what would do.
    """
    if dtype != torch.float64 or not len(problem.rows) or not problem.rows.any() or not problem.weight.any():
        return
    units = Units.of(problem)
    if not _LEAST_OUTPUT < units.inputs * units.weights < 1 / _LEAST_OUTPUT:
        raise CalibrationError(
            f"layer {problem.layer}: products of its inputs (about {units.inputs:.0e}) and weights (about "
            f"{units.weights:.0e}) leave the range of float32, in which integers are scaled; bring the model to "
            "another unit, or keep the layer by a rule without a scheme"
        )


def _relative(gradients: Tensor, counts: Tensor | None, most: float) -> Tensor:
    """Weights float32 [R] of mean 1 from squared gradients: no row counts for nothing, none above ``most`` means."""
    mass = torch.ones_like(gradients) if counts is None else counts
    mean = float((gradients * mass).sum() / mass.sum())
    if not mean > 0:
        return torch.ones_like(gradients)
    weights = (gradients / mean).clamp(max=most) + LEAST_GRADIENT
    return weights * (mass.sum() / (weights * mass).sum())


def _no_data(width: int) -> LayerStatistics:
    """Statistics of a layer whose inputs are measured at run time and that calibration did not look at."""
    zeros = torch.zeros(width, dtype=torch.float32, device="cpu")
    empty = torch.zeros(0, dtype=torch.int64, device="cpu")
    return LayerStatistics(low=zeros, high=zeros, rows=zeros.new_zeros(0, width), chunks=empty, seen=0)


def _quality(problem: LayerProblem, update: LayerUpdate) -> float:
    """Output SQNR in dB, NaN where there are no rows to measure it on."""
    return round(output_sqnr(problem, update), 3) if len(problem.rows) else math.nan


def _key(problem: LayerProblem, methods: tuple[Method, ...], judged: tuple[Tensor, ...]) -> str:
    """Digest of everything that a layer's integers, and what is judged of them, follow from."""
    settings = [
        problem.layer,
        problem.split,
        problem.seed,
        dataclasses.asdict(problem.scheme),
        [[type(method).__name__, dataclasses.asdict(method)] for method in methods],
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    tensors = (problem.weight, problem.low, problem.high, problem.rows, problem.row_weights)
    moments = () if problem.moments is None else (problem.moments.mean, problem.moments.covariance)
    others = (problem.counts, problem.bias, problem.branch, *moments)
    for tensor in (*tensors, *(t for t in others if t is not None), *judged):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _stacked(problems: list[LayerProblem]) -> LayerProblem:
    """Problems with the same input as one, its weights [sum N, K] one below the other."""
    first, *others = problems
    if not others:
        return first
    weight = torch.cat([problem.weight for problem in problems])
    name = f"{first.layer} with {len(others)} more"
    branches = [torch.zeros_like(p.weight) if p.branch is None else p.branch for p in problems]
    branch = None if all(p.branch is None for p in problems) else torch.cat(branches)
    return dataclasses.replace(first, layer=name, weight=weight, bias=_stacked_bias(problems), branch=branch)


def _stacked_bias(problems: list[LayerProblem]) -> Tensor | None:
    """Biases one below the other, zeros where a layer has none; None where none has."""
    biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in problems]
    return None if all(p.bias is None for p in problems) else torch.cat(biases)


def _split(update: LayerUpdate, sizes: list[int]) -> list[LayerUpdate]:
    """The update of each layer of a stacked problem, by its number of outputs."""
    rows, scales = update.weight.split(sizes), update.weight_scale.split(sizes, 1)
    nothing = [None] * len(sizes)
    shifts, multipliers = (nothing if t is None else t.split(sizes) for t in (update.bias_shift, update.multiplier))
    return [
        dataclasses.replace(update, weight=row, weight_scale=scale, bias_shift=shift, multiplier=multiplier)
        for row, scale, shift, multiplier in zip(rows, scales, shifts, multipliers, strict=True)
    ]


def _to_tensors(updates: list[LayerUpdate]) -> dict[str, Tensor]:
    """Tensors with memory of their own, by number and name."""
    fields = [field.name for field in dataclasses.fields(LayerUpdate)]
    named = {f"{i}.{name}": getattr(update, name) for i, update in enumerate(updates) for name in fields}
    several = len(updates) > 1
    return {name: (t.clone() if several else t).cpu() for name, t in named.items() if t is not None}


def _from_tensors(tensors: dict[str, Tensor], number: int) -> LayerUpdate:
    fields = [field.name for field in dataclasses.fields(LayerUpdate)]
    return LayerUpdate(**{name: tensors.get(f"{number}.{name}") for name in fields})  # type: ignore[arg-type]
