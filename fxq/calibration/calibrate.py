"""Drive the graph on calibration data and fold what planned linears see into bounded statistics."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxq.calibration.agreement import describe
from fxq.calibration.collect import CalibrationError, Collector
from fxq.calibration.observers import GradientObserver, Observer
from fxq.calibration.rollout import Rollout, current_call
from fxq.core.ir import QuantGraph
from fxq.core.method import LayerStatistics
from fxq.core.signature import call_rules, flatten_call, rules_of
from fxq.runtime.memory.residency import Residency
from fxq.runtime.messages import first_line
from fxq.runtime.workers import Workers

NO_BATCH = (
    "the calibration loader yielded no batch; static scales need at least one. A generator yields its batches once: "
    "make a new one for every call, or a list"
)

OnProgress = Callable[[int, int | None], None]
"""Told (batches or calls done, total or None)."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One calibration call with its chunk, for loaders that are not a :class:`~fxq.calibration.rollout.Rollout`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chunk: int = 0


def as_batch(item: object) -> Batch:
    """Read a loader's item: Batch, dict (keywords), tuple or list (positional), or one tensor.

    Raises:
        CalibrationError: for anything else.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping):
        return Batch((), dict(item))
    if isinstance(item, tuple | list):
        return Batch(tuple(item))
    if isinstance(item, Tensor):
        return Batch((item,))
    raise CalibrationError(
        f"the calibration loader yielded {type(item).__name__}; expected a dict (keyword arguments), a tuple or list "
        "(positional arguments), a tensor (one argument) or fxq.Batch"
    )


def usable(item: object, number: int) -> Batch:
    """:func:`as_batch` of a loader's item number ``number``, with tensors that any mode of torch can compute with.

    Tensors that require gradients are detached, those of inference mode copied.

    Raises:
        CalibrationError: for an item of another kind, or one with numpy arrays or numbers where tensors belong.
    """
    batch = as_batch(item)
    leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs)))
    if any(isinstance(leaf, np.ndarray) for leaf in leaves):
        raise CalibrationError(
            f"calibration batch {number} has numpy arrays; make tensors of them by torch.from_numpy, and mind the dtype"
        )
    if leaves and all(isinstance(leaf, int | float | complex) for leaf in leaves):
        raise CalibrationError(
            f"calibration batch {number} is {len(leaves)} numbers without a tensor, and a tuple or list is one "
            "argument an item: make it a tensor by torch.tensor"
        )
    args, kwargs = pytree.tree_map(_plain, (batch.args, dict(batch.kwargs)))
    return dataclasses.replace(batch, args=args, kwargs=kwargs)


def _plain(leaf: object) -> object:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach() if leaf.requires_grad else leaf
    return leaf.clone() if leaf.is_inference() else leaf


def observed(module: fx.GraphModule, collector: Collector, gradients: bool = False) -> Callable[..., object]:
    """A callable like ``module`` that also feeds ``collector``, with gradients or without."""
    observer = GradientObserver(module, collector) if gradients else Observer(module, collector)
    rules = rules_of(module) or call_rules(module)

    def call(*args: object, **kwargs: object) -> object:
        if (current := current_call()) is not None:
            collector.chunk = current.chunk
        flat = flatten_call(module, args, kwargs)
        rules.check(flat)
        result = observer.call(*flat)
        collector.give_back()
        return result

    return call


def calibrate(
    graph: QuantGraph,
    loader: Iterable[object] | Rollout | None,
    forward_loop: Callable[[Callable[..., Any]], None] | None,
    collector: Collector,
    on_progress: OnProgress | None = None,
    workers: Workers | None = None,
    gradients: bool = False,
) -> str:
    """Collect statistics of every planned linear into ``graph.statistics``.

    Args:
        graph: a PLANNED graph.
        loader: batches, or a rollout whose every (condition, draws) is generated; exactly one of it and
        forward_loop: a closure that calls the given callable as it would the model.
        collector: bounds and seed.
        on_progress: told the work done.
        workers: ranks that take turns with the batches; a forward_loop runs whole on each.
        gradients: whether to measure how much the model's output depends on each row.

    Returns:
        sha256 of what was collected, the calibration hash of manifests.

    Raises:
        CalibrationError: no data, data that does not fit, values that are not finite, or a planned layer that
            received no row.
        fxq.runtime.workers.WorkerError: when a rank is gone.
    """
    run, workers = observed(graph.module, collector, gradients), workers or Workers()
    with torch.no_grad():
        if forward_loop is not None:
            forward_loop(run)
        elif isinstance(loader, Rollout):
            _drive_rollout(loader, run, collector, on_progress, workers)
        else:
            assert loader is not None
            _drive_batches(loader, run, collector, on_progress, workers)
    if forward_loop is None:
        collector.merge(workers)
    statistics = collector.finish()
    unseen = [layer for layer in graph.quantized_plans if layer not in statistics]
    if unseen:
        raise CalibrationError(
            f"{len(unseen)} planned layer(s) received no calibration row: {', '.join(unseen[:8])}"
            f"{' ...' if len(unseen) > 8 else ''}. Feed data that reaches them, or exclude them "
            "by a rule with scheme None"
        )
    graph.adopt(statistics)
    return statistics_hash(statistics)


def _drive_rollout(
    rollout: Rollout, run: Callable[..., object], collector: Collector, on_progress: OnProgress | None, workers: Workers
) -> None:
    mine = [(i, *batch) for i, batch in enumerate(rollout.batches) if i % workers.size == workers.rank]
    done, total = 0, sum(rollout.units(condition, draws) for _, condition, draws in mine)
    with rollout.using(run):
        for collector.batch, condition, draws in mine:
            state = rollout.begin(condition, draws)
            for _ in range(rollout.units(condition, draws)):
                state = rollout.advance(state)
                done += 1
                if on_progress:
                    on_progress(done, total)


def _drive_batches(
    loader: Iterable[object],
    run: Callable[..., object],
    collector: Collector,
    on_progress: OnProgress | None,
    workers: Workers,
) -> None:
    length, count, seen = operator.length_hint(loader) or None, 0, hashlib.sha256()
    for count, item in enumerate(loader, 1):
        collector.batch = count - 1
        if workers.size > 1:
            seen.update(describe(item if not isinstance(item, Batch) else [item.args, dict(item.kwargs)]).encode())
        if collector.batch % workers.size != workers.rank:
            continue
        batch = usable(item, collector.batch)
        collector.chunk = batch.chunk
        try:
            run(*batch.args, **batch.kwargs)
        except CalibrationError:
            raise
        except Exception as error:
            shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in batch.args]
            shapes += [f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in batch.kwargs.items()]
            raise CalibrationError(
                f"calibration batch {collector.batch} does not fit the captured model: {first_line(error)}. "
                f"Its inputs: {shapes}"
            ) from error
        if on_progress:
            on_progress(count, length)
    if workers.size > 1:
        facts = {"number of batches": str(count), "content of its batches": seen.hexdigest()[:16]}
        workers.agree({"calibration data": facts})
    if not count:
        raise CalibrationError(NO_BATCH)


def statistics_hash(statistics: Mapping[str, LayerStatistics]) -> str:
    """sha256 over layer names, extremes, sampled rows, their weights and gradients."""
    digest, residency = hashlib.sha256(), Residency()
    for layer in sorted(statistics):
        s = statistics[layer]
        digest.update(f"{layer}:{s.seen}:{tuple(s.rows.shape)}".encode())
        for tensor in (s.low, s.high, s.rows, *(t for t in (s.weights, s.gradients) if t is not None)):
            for part in tensor.split(4096):
                digest.update(part.float().contiguous().numpy().data)
                residency.give_back(part)
        for tensor in () if s.sums is None else s.sums.state().values():
            digest.update(tensor.numpy().data)
            residency.give_back(tensor)
    return digest.hexdigest()
