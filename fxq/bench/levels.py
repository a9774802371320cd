"""Contestants of the levels that are one call of one module: a linear, an FFN, a block."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxq.bench import cases, ours
from fxq.bench.contest import BASELINES, Case, Contestant
from fxq.bench.floats import own_dtype
from fxq.bench.problems import Problem, block_problem, linear_problem
from fxq.bench.rivals import rivals_for
from fxq.dtypes import dtype_name


def _ours(problem: Problem, device: str, bounds: dict[str, float], single: bool) -> tuple[Contestant, ...]:
    dtype = own_dtype(device)

    def contestant(name: str, arithmetic: str = "int8", **scheme: Any) -> Contestant:
        def build() -> Any:
            return ours.build(problem.model(dtype), problem.args(dtype), ours.speed_recipe(**scheme), device)

        return Contestant(name, build, bounds[arithmetic], arithmetic, dtype_name(dtype), ours=True)

    def compiled() -> Any:
        return ours.through_backend(problem.model(dtype), problem.args(dtype))

    dual = (
        contestant("fxq dual scale", dual_scale=True),
        contestant("fxq per token", dual_scale=True, per_token=True),
        contestant("fxq W4A8", "int4", dual_scale=True, weight_bits=4),
    )
    if single:
        narrower = contestant("fxq W7A8", dual_scale=True, weight_bits=7)
        return (contestant("fxq single scale", dual_scale=False), *dual, narrower)
    return (*dual, Contestant("fxq torch.compile", compiled, bounds["int8"], "int8", dtype_name(dtype), ours=True))


def _contestants(level: str, problem: Problem, device: str, threads: int, single: bool) -> tuple[Contestant, ...]:
    bounds = cases.LEAST_SQNR[level]
    rivals = tuple(rival.contestant(problem, threads, bounds) for rival in rivals_for(level, device))
    return rivals + _ours(problem, device, bounds, single)


def linear_case(shape: cases.LinearShape, device: str, threads: int) -> Case:
    """A linear or an FFN from float to float, against float64 on 64 rows."""
    problem = linear_problem(shape, device)

    def reference() -> Tensor:
        rows = problem.pick(problem.args(torch.float64)[0])
        return problem.model(torch.float64)(rows)

    contestants = _contestants("linear", problem, device, threads, single=True)
    return Case(shape.name, reference, contestants, problem.pick, vars(shape))


def block_case(shape: cases.BlockShape, device: str, threads: int) -> Case:
    """A block, against its float32 eager output."""
    problem = block_problem(shape, device)

    def reference() -> Tensor:
        return problem.pick(problem.module(*problem.args(torch.float32)))

    facts = {"rows": shape.rows, "keys": shape.keys, **vars(shape.config)}
    contestants = _contestants("block", problem, device, threads, single=False)
    return Case(shape.name, reference, contestants, problem.pick, facts)


def only(case: Case, patterns: Sequence[str]) -> Case:
    """The case with the baselines and the contestants whose names match one of the globs; all without globs.

    Raises:
        ValueError: when a glob matches no contestant.
    """
    if not patterns:
        return case
    names = [contestant.name for contestant in case.contestants]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{pattern!r} matches no contestant; there are: {', '.join(names)}")

    def wanted(name: str) -> bool:
        return name in BASELINES or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return replace(case, contestants=tuple(c for c in case.contestants if wanted(c.name)))
