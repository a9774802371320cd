"""Analysis: how many bits the weights of each layer get, for the least predicted error that a budget allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from fxq.core.config import Budget, RecipeError
from fxq.core.graph import LinearSite
from fxq.core.ir import LayerPlan, QuantGraph, Stage, planned, set_plan
from fxq.core.method import LayerProblem, LayerUpdate
from fxq.core.pipeline import Analysis
from fxq.core.rows import Weighting
from fxq.numerics import PACK_BLOCK
from fxq.passes.apply_methods import ApplyMethods
from fxq.passes.kernel_times import GroupTimes
from fxq.passes.knapsack import Choice, KnapsackError, choose, hull
from fxq.passes.methods import output_errors

FACT = "widths"
"""Name of what the pass found among the facts of a module."""

_KEPT = 16
_LONGEST = 2000  # characters of a reason
_Group = list[LinearSite]
_Plans = dict[str, LayerPlan]


@dataclasses.dataclass(frozen=True)
class PredictedError:
    """What the rounding of a group of layers costs, on its calibration rows.

    By the gradients that calibration measured: ``sum_i c_i g_i |W x_i - W' x'_i|^2``, where row i stands for ``c_i``
    rows and ``g_i`` is the squared gradient of the model's output. To second order (Gauss and Newton) that is what the
    group adds to the squared error of the model's output, summed over all calibration calls. Without gradients: the sum
    over the layers of ``sum_i w_i |W x_i - W' x'_i|^2 / sum_i w_i |W x_i + b|^2`` with the loss weights of the rows.
    """

    gradients: bool

    def reads(self, graph: QuantGraph, layer: str) -> tuple[Tensor, ...]:
        """Mass of each row, float64 [R], with gradients; nothing without."""
        if not self.gradients:
            return ()
        statistics = graph.statistics[layer]
        if statistics.gradients is None:
            raise ValueError(f"layer {layer} was calibrated without gradients, and the weighting needs them")
        rows = len(statistics.rows)
        counts = torch.full((rows,), statistics.seen / max(1, rows), dtype=torch.float64, device="cpu")
        counts = counts if statistics.weights is None else statistics.weights.double().cpu()
        return (counts * statistics.gradients.double().cpu(),)

    def judge(
        self, problem: LayerProblem, update: LayerUpdate, sizes: list[int], reads: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """``{"error": float64 []}``."""
        mass = reads[0].to(problem.rows.device) if self.gradients else problem.row_weights
        noise, signal = output_errors(problem, update, mass)
        if self.gradients:
            return {"error": noise.sum().cpu()}
        parts = zip(noise.split(sizes), signal.split(sizes), strict=True)
        shares = [float(n.sum() / s.sum()) if float(s.sum()) > 0 else float(n.sum() > 0) for n, s in parts]
        return {"error": torch.tensor(sum(shares), dtype=torch.float64, device="cpu")}


@dataclasses.dataclass(frozen=True)
class ChooseWidths(Analysis):
    """Solves every group of layers at each width of the budget and keeps the widths of least predicted error.

    Stands in the place of :class:`~fxq.passes.ApplyMethods`, whose groups and checkpoints it uses: layers that
    share an input get the same width, every candidate is solved once and has a checkpoint of its own, and ranks divide
    the groups. Writes the scheme of each layer, the reason for its width, its update, and what was found of the whole
    into ``graph.found["widths"]``: ``bytes`` of all linears as stored, ``error``, ``gap`` (how much less error, or
    bytes where these are minimised, another choice could have at most; 0: proved), and ``frontier``, pairs of bytes and
    error, each the least error at its bytes; where kernels were measured, also their ``time`` as the budget counts it.
    Errors by gradients are told per row of the layer that sees most rows, which more data do not change.

    Layers whose inputs do not fit the packing of int4 stay at the widest integers.
    """

    methods: ApplyMethods
    budget: Budget
    needs: ClassVar[Stage] = Stage.CALIBRATED
    gives: ClassVar[Stage] = Stage.CALIBRATED

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers whose width was chosen.

        Raises:
            RecipeError: when the budget cannot be met, telling the least that can.
            ValueError: when a layer has no calibration rows, or no gradients where the weighting is by them.
            fxq.runtime.workers.WorkerError: when a rank is gone.
        """
        plans, groups = graph.quantized_plans, self.methods.groups(graph)
        if unseen := [layer for layer in plans if not len(getattr(graph.statistics.get(layer), "rows", ()))]:
            raise ValueError(f"a budget needs calibration rows of every layer, and {unseen[0]} has none")
        table = _Table.of(graph, [self._candidates(plans, group) for group in groups])
        if self.budget.time is not None:
            table = dataclasses.replace(table, times=GroupTimes.of(graph, groups, table.candidates))
        table.limit(self.budget)  # refuses at once what shapes alone rule out
        errors, solved, owners = self._solve(graph, groups, table.candidates, plans)
        choice = table.choose(self.budget, errors)
        notes = planned(graph.module)
        for i, (group, owner) in enumerate(zip(groups, owners, strict=True)):
            number = choice.options[i]
            chosen = table.candidates[i][number]
            tensors = solved.pop(i)[number] if i in solved else None
            for site in group:
                plan = dataclasses.replace(chosen[site.layer], reason=table.told(i, errors[i], group)[:_LONGEST])
                for node in notes[site.layer][1]:
                    set_plan(node, plan)
                notes[site.layer] = plan, notes[site.layer][1]
            if chosen[group[0].layer].scheme is not None:
                self.methods.record(graph, group, notes, graph.workers.share(tensors, owner))
        graph.found[FACT] = table.found(choice, errors, self.methods.weighting)
        return len(plans)

    def _candidates(self, plans: _Plans, group: _Group) -> list[_Plans]:
        """The group's plans at each width that it can have."""
        members = [plans[site.layer] for site in group]
        fits = all(plan.in_features % PACK_BLOCK == 0 for plan in members)
        widths = [width for width in self.budget.widths if fits or width != 4]
        return [{plan.layer: _at(plan, width) for plan in members} for width in widths]

    def _solve(
        self, graph: QuantGraph, groups: list[_Group], candidates: list[list[_Plans]], plans: _Plans
    ) -> tuple[list[list[float]], dict[int, list[dict[str, Tensor]]], list[int]]:
        """Errors of each group's candidates, this rank's results by group, and the rank of each group."""
        methods, judge = self.methods, PredictedError(self.methods.weighting is Weighting.GRADIENT)
        owners = graph.owners([plans[site.layer] for site in group] for group in groups)
        mine = [i for i, owner in enumerate(owners) if owner == graph.workers.rank]
        report: Callable[[str, int, int], None] = methods.on_layer or (lambda layer, done, total: None)
        solved: dict[int, list[dict[str, Tensor]]] = {}
        done, total = 0, sum(len(groups[i]) for i in mine)
        for i in mine:
            report(groups[i][0].layer, done, total)
            solved[i] = [
                methods.solve(graph, groups[i], plan, judge) if plan[groups[i][0].layer].scheme else {}
                for plan in candidates[i]
            ]
            done += len(groups[i])
        if total:
            report("", total, total)
        rows = max((graph.statistics[layer].seen for layer in plans), default=1) if judge.gradients else 1
        nothing = torch.zeros((), dtype=torch.float64, device="cpu")  # of layers in model dtype
        errors = []
        for i, owner in enumerate(owners):
            own = {str(n): result.get("error", nothing) for n, result in enumerate(solved.get(i, ()))}
            errors.append([float(error) / rows for error in graph.workers.share(own, owner).values()])
        return errors, solved, owners


@dataclasses.dataclass(frozen=True)
class _Table:
    """Candidates of each group with their bytes: of weights, and of all that is stored, beside layers kept by rules."""

    candidates: list[list[_Plans]]
    weights: list[list[int]]
    stored: list[list[int]]
    kept: int
    in_bf16: int
    times: GroupTimes | None = None

    @classmethod
    def of(cls, graph: QuantGraph, candidates: list[list[_Plans]]) -> _Table:
        weights = [[sum(map(_weight_bytes, plans.values())) for plans in group] for group in candidates]
        stored = [[sum(map(_stored_bytes, plans.values())) for plans in group] for group in candidates]
        plans = graph.plans.values()
        kept = sum(_bf16_bytes(plan) for plan in plans if plan.scheme is None)
        return cls(candidates, weights, stored, kept, sum(map(_bf16_bytes, plans)))

    @property
    def numbers(self) -> int:
        """Weights of the layers that the recipe quantizes."""
        return sum(p.in_features * p.out_features for group in self.candidates for p in group[0].values())

    def limit(self, budget: Budget) -> tuple[Sequence[Sequence[float]], float]:
        """Bytes or seconds of the candidates as the budget counts them, and how many it allows; no limit: infinite.

        Raises:
            RecipeError: when the narrowest candidates need more.
        """
        name, value = budget.limit
        if name == "max_error":
            return self.stored, math.inf
        if self.times is not None:
            return self.times.seconds, self._most_seconds(value)
        by_ratio = name == "ratio"
        counted, unit = (self.stored, self.in_bf16) if by_ratio else (self.weights, Fraction(self.numbers, 8))
        fixed = self.kept if by_ratio else 0
        least = fixed + sum(min(group) for group in counted)
        most = math.floor(Fraction(repr(float(value))) * unit)
        if unit and float((most + 1) / Fraction(unit)) <= value:
            most += 1  # what facts tell of a choice, a rounded quotient, allows this choice
        if least > most:
            least_value = math.ceil(Fraction(least) / unit * 10**6) / 10**6 if unit else 0.0
            raise RecipeError(
                f"budget: {name} = {value:g} cannot be met, the least possible is {least_value:.7g}: that is every "
                f"layer at its narrowest ({least} bytes)"
            )
        return counted, most - fixed

    def _most_seconds(self, value: float) -> float:
        assert self.times is not None
        least, unit = math.fsum(map(min, self.times.seconds)), self.times.in_floats
        if least > value * unit:
            raise RecipeError(
                f"budget: time = {value:g} cannot be met, the least possible is {least / unit:.4g}, as measured now: "
                "that is every layer at its fastest"
            )
        return value * unit

    def choose(self, budget: Budget, errors: list[list[float]]) -> Choice:
        """The best choice under the budget.

        Raises:
            RecipeError: when every choice has more error than it allows.
        """
        counted, most = self.limit(budget)
        try:
            if budget.max_error is None:
                return choose(_options(counted, errors), most)
            return choose(_options(errors, counted), budget.max_error)
        except KnapsackError:
            least = math.fsum(map(min, errors))
            raise RecipeError(
                f"budget: max_error = {budget.max_error:g} cannot be met, the least possible is {least:.6g}; widths "
                f"are {list(budget.widths)}"
            ) from None

    def told(self, number: int, errors: list[float], group: _Group) -> str:
        """Error and bytes of each candidate of a group, and the time where it was measured."""
        times = [""] * len(errors)
        if self.times is not None:
            times = [f", {1e3 * seconds:.3g} ms" for seconds in self.times.seconds[number]]
        texts = [
            f"{error:.3g} at {_width(plans[group[0].layer])} bits ({size} bytes{time})"
            for plans, error, size, time in zip(
                self.candidates[number], errors, self.stored[number], times, strict=True
            )
        ]
        members = f", of {' + '.join(site.layer for site in group)}" if len(group) > 1 else ""
        return f"predicted error {', '.join(texts)}{members}"

    def found(self, choice: Choice, errors: list[list[float]], weighting: Weighting) -> dict[str, object]:
        """What the facts say of the choice, in JSON form."""
        picked = list(zip(choice.options, self.candidates, strict=True))
        bits = {plan.layer: _width(plan) for i, group in picked for plan in group[i].values()}
        size = sum(group[i] for i, group in zip(choice.options, self.stored, strict=True)) + self.kept
        integers = sum(group[i] for i, group in zip(choice.options, self.weights, strict=True))
        corners = hull(_options(self.stored, errors))
        measured = {}
        if self.times is not None:
            taken = math.fsum(group[i] for i, group in zip(choice.options, self.times.seconds, strict=True))
            measured["time"] = taken / self.times.in_floats if self.times.in_floats else 1.0
        return {
            "bytes": size,
            "ratio": size / self.in_bf16 if self.in_bf16 else 1.0,
            "bits_per_weight": 8 * integers / self.numbers if self.numbers else 0.0,
            "error": math.fsum(group[i] for i, group in zip(choice.options, errors, strict=True)),
            "error_of": "output" if weighting is Weighting.GRADIENT else "layers",
            "gap": choice.gap,
            "layers": bits,
            "frontier": [[int(corner.weight) + self.kept, corner.cost] for corner in corners],
            **measured,
        }


def _options(weights: Sequence[Sequence[float]], costs: Sequence[Sequence[float]]) -> list[list[tuple[float, float]]]:
    return [list(zip(*group, strict=True)) for group in zip(weights, costs, strict=True)]


def _at(plan: LayerPlan, width: int) -> LayerPlan:
    """The plan at a width of weights."""
    if width == _KEPT:
        return dataclasses.replace(plan, scheme=None, outliers=())
    return dataclasses.replace(plan, scheme=dataclasses.replace(plan.quantization, weight_bits=width))


def _width(plan: LayerPlan) -> int:
    return _KEPT if plan.scheme is None else plan.scheme.weight_bits


def _weight_bytes(plan: LayerPlan) -> int:
    return plan.out_features * plan.in_features * _width(plan) // 8


def _bf16_bytes(plan: LayerPlan) -> int:
    return 2 * plan.out_features * (plan.in_features + 1)


def _stored_bytes(plan: LayerPlan) -> int:
    """Bytes of a frozen layer, as the summary counts them."""
    if plan.scheme is None:
        return _bf16_bytes(plan)
    groups = 2 if plan.outliers else 1
    scales = groups * plan.out_features + plan.out_features  # and offsets
    inputs = 0 if plan.scheme.per_token else 2 * groups
    return plan.scheme.weight_bytes(plan.out_features, plan.in_features) + 4 * (
        scales + inputs + (plan.in_features if plan.outliers else 0)
    )
