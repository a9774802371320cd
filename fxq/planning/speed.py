"""How fast this machine does what a quantization consists of, measured in a fraction of a second."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fxq.core.config import Recipe, Scheme
from fxq.core.method import LayerProblem, LayerUpdate, LearningMethod, Method, SolvingMethod

_WIDTH = 2048
_SEARCHED, _LEARNED = 384, 96  # outputs of the slices; their weights do not fit a core's own cache


@dataclass(frozen=True)
class Speed:
    """Measured times.

    Attributes:
        flops: operations per second of linears and attention in the model's dtype.
        search: seconds per weight of the methods that choose scales.
        inputs: seconds per calibration value of the same methods.
        learn: seconds per weight and iteration of the methods that learn from data.
    """

    flops: float
    search: float
    inputs: float = 0.0
    learn: float = 0.0


def measure_speed(recipe: Recipe, dtype: torch.dtype) -> Speed:
    """Measure the recipe's own methods on a slice of a weight; takes about half a second.

    Args:
        recipe: its methods and its most general scheme are used.
        dtype: of the model.
    """
    scheme = next((rule.scheme for rule in reversed(recipe.rules) if rule.scheme is not None), Scheme())
    search = [method for method in recipe.methods if not isinstance(method, LearningMethod | SolvingMethod)]
    learn = [method for method in recipe.methods if isinstance(method, LearningMethod) and scheme.reconstruct]
    few, more = (_search_seconds(scheme, rows, search) for rows in (16, 80))
    iteration = sum(_iteration(method, _problem(scheme, _LEARNED, method.rows), search) for method in learn)
    inputs = 0.0 if scheme.per_token else max(0.0, more - few) / (64 * _WIDTH)
    weights = (few - 16 * _WIDTH * inputs) / (_SEARCHED * _WIDTH)
    return Speed(_flops(dtype), max(weights, 0.0), inputs, iteration / (_LEARNED * _WIDTH))


def _search_seconds(scheme: Scheme, rows: int, methods: Sequence[Method]) -> float:
    problem = _problem(scheme, _SEARCHED, rows)
    return _time(lambda: _apply(methods, problem))


def _problem(scheme: Scheme, outputs: int, rows: int) -> LayerProblem:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, _WIDTH, generator=generator, dtype=torch.float32) for count in (rows, outputs))
    return LayerProblem(
        layer="a slice",
        weight=weight,
        low=x.amin(0),
        high=x.amax(0),
        rows=x,
        row_weights=torch.ones(rows, dtype=torch.float32),
        scheme=scheme,
        split=_WIDTH,
        seed=0,
    )


def _apply(methods: Sequence[Method], problem: LayerProblem, update: LayerUpdate | None = None) -> LayerUpdate | None:
    """Methods one after the other, as a recipe has them."""
    for method in methods:
        update = method.apply(problem, update)
    return update


def _iteration(method: Any, problem: LayerProblem, search: Sequence[Method]) -> float:
    """Seconds of one iteration: half the difference of runs with three and with one."""
    one, three = (dataclasses.replace(method, iterations=count) for count in (1, 3))
    update = _apply(search, problem)
    first = _time(lambda: _apply((one,), problem, update))
    return max(_time(lambda: _apply((three,), problem, update)) - first, first / 10) / 2


def _flops(dtype: torch.dtype) -> float:
    """Operations per second of a linear and an attention, a third of them in attention."""
    x, w = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    q, k = torch.randn(1, 4, 256, 128).to(dtype), torch.randn(1, 4, 2048, 128).to(dtype)
    with torch.no_grad():
        linear = _time(lambda: F.linear(x, w), 3) / (2 * 512 * 1024 * 1024)
        attention = _time(lambda: F.scaled_dot_product_attention(q, k, k), 3) / (4 * 4 * 256 * 2048 * 128)
    return 3 / (2 * linear + attention)


def _time(run: Callable[[], object], repeats: int = 1) -> float:
    """Median seconds of a run after one that does not count; of a single run if it is not repeated."""
    times = []
    for _ in range(repeats + (repeats > 1)):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times[repeats > 1 :])[repeats // 2]
