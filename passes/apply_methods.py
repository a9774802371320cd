"""Analysis: run the recipe's methods layer by layer on the statistics and keep the integers they choose."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxq.graph import LinearSite, linear_sites
from fxq.ir import LayerPlan, LayerStatistics, LayerUpdate, QuantGraph, Stage, planned, set_plan
from fxq.passes.methods import LayerProblem, Method, output_sqnr
from fxq.passes.share_inputs import input_groups
from fxq.pipeline import Analysis

_TENSORS = ("weight", "weight_scale", "input_scale", "input_zero_point")


def group_order(plan: LayerPlan) -> Tensor:
    """Permutation int64 [K] that puts normal channels first and outliers last, each ascending."""
    outliers = torch.tensor(plan.outliers, dtype=torch.int64)
    normal = torch.ones(plan.in_features, dtype=torch.bool)
    normal[outliers] = False
    return torch.cat((normal.nonzero().flatten(), outliers))


@dataclasses.dataclass(frozen=True)
class ApplyMethods(Analysis):
    """Fills ``graph.updates`` and each plan's output SQNR.

    With ``checkpoint_dir`` every finished layer is one file; a rerun with the same layer, data and settings reads it
    instead of working again. ``on_layer`` is told (layer, done, total). With ``share_inputs`` layers that read the same
    input (:func:`~fxq.passes.share_inputs.input_groups`) are one problem of stacked weights on the first one's rows:
    their input scales are equal, whatever the methods do, and a checkpoint holds all of them.
    """

    methods: tuple[Method, ...]
    weighting: str = "sensitivity"
    seed: int = 0
    checkpoint_dir: pathlib.Path | None = None
    on_layer: Callable[[str, int, int], None] | None = None
    share_inputs: bool = False
    needs: ClassVar[Stage] = Stage.CALIBRATED
    gives: ClassVar[Stage] = Stage.CALIBRATED

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers worked on."""
        notes = planned(graph.module)
        total, done = len(graph.quantized_plans), 0
        for group in self._groups(graph):
            if self.on_layer is not None:
                self.on_layer(group[0].layer, done, total)
            problems = [self._problem(graph, site, notes[site.layer][0]) for site in group]
            joint = _stacked(problems)
            updates = _split(self._solve(joint), [len(problem.weight) for problem in problems])
            for problem, update in zip(problems, updates, strict=True):
                graph.updates[problem.layer] = update
                plan, nodes = notes[problem.layer]
                sqnr = round(output_sqnr(problem, update), 3)
                for node in nodes:
                    set_plan(node, dataclasses.replace(plan, output_sqnr=sqnr))
            done += len(group)
        if self.on_layer is not None and total:
            self.on_layer("", total, total)
        return total

    def _groups(self, graph: QuantGraph) -> list[list[LinearSite]]:
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

    def _problem(self, graph: QuantGraph, site: LinearSite, plan: LayerPlan) -> LayerProblem:
        statistics: LayerStatistics = graph.statistics[plan.layer]
        order = group_order(plan)
        assert plan.scheme is not None
        weights = graph.chunk_weights
        if self.weighting == "single_scale_only" and plan.outliers:
            weights = torch.ones_like(weights)
        chunk = statistics.chunks.clamp(max=len(weights) - 1)
        return LayerProblem(
            layer=plan.layer,
            weight=site.weight(graph.module).float().cpu()[:, order],
            low=statistics.low[order],
            high=statistics.high[order],
            rows=statistics.rows.float()[:, order],
            row_weights=weights[chunk].float(),
            scheme=plan.scheme,
            split=plan.split,
            seed=self.seed,
        )

    def _solve(self, problem: LayerProblem) -> LayerUpdate:
        key, path = "", None
        if self.checkpoint_dir is not None:
            key = self._key(problem)
            path = self.checkpoint_dir / (re.sub(r"[^\w.-]", "_", problem.layer) + ".safetensors")
            if (saved := _read(path, key)) is not None:
                return saved
        update: LayerUpdate | None = None
        for method in self.methods:
            update = method.apply(problem, update)
        if update is None:
            raise ValueError("the recipe has no method; RangeSearch() or MinMax() is the least")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            save_file({name: getattr(update, name) for name in _TENSORS}, part, metadata={"key": key})
            part.replace(path)
        return update

    def _key(self, problem: LayerProblem) -> str:
        settings = [
            problem.layer,
            problem.split,
            problem.seed,
            dataclasses.asdict(problem.scheme),
            _describe(self.methods),
        ]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for tensor in (problem.weight, problem.low, problem.high, problem.rows, problem.row_weights):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _stacked(problems: list[LayerProblem]) -> LayerProblem:
    """Problems with the same input as one, its weights [sum N, K] one below the other."""
    first, *others = problems
    if not others:
        return first
    weight = torch.cat([problem.weight for problem in problems])
    return dataclasses.replace(first, layer=f"{first.layer} with {len(others)} more", weight=weight)


def _split(update: LayerUpdate, sizes: list[int]) -> list[LayerUpdate]:
    """The update of each layer of a stacked problem, by its number of outputs."""
    if len(sizes) == 1:
        return [update]
    rows, scales = update.weight.split(sizes), update.weight_scale.split(sizes, 1)
    return [
        LayerUpdate(
            weight=row.clone(),
            weight_scale=scale.clone(),
            input_scale=update.input_scale.clone(),
            input_zero_point=update.input_zero_point.clone(),
        )
        for row, scale in zip(rows, scales, strict=True)
    ]


def _describe(methods: tuple[Any, ...]) -> list[Any]:
    return [[type(method).__name__, dataclasses.asdict(method)] for method in methods]


def _read(path: pathlib.Path, key: str) -> LayerUpdate | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return LayerUpdate(**{name: file.get_tensor(name) for name in _TENSORS})
    except SafetensorError:
        return None
