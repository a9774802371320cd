"""Drive the graph on calibration data and fold what planned linears see into bounded statistics."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxq.ir import LayerStatistics, QuantGraph, plan_of
from fxq.rollout import Rollout, current_call
from fxq.signature import check_sizes, flatten_call, input_sizes

OnProgress = Callable[[int, int | None], None]
"""Told (batches or calls done, total or None)."""


class CalibrationError(ValueError):
    """Calibration data that is missing, misshapen, not finite or that never reaches a planned layer."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One calibration call with its chunk, for loaders that are not a :class:`~fxq.rollout.Rollout`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chunk: int = 0


def as_batch(item: Any) -> Batch:
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


class Collector:
    """Folds input rows of layers: exact extremes, and a seeded sample of at most ``max_rows`` rows a layer.

    ``leaders`` maps layers to one that is called before them on the same input: they get its statistics, stored once.
    The samples of all other layers are what they are without it.
    """

    def __init__(self, rows_per_call: int, max_rows: int, seed: int, leaders: Mapping[str, str] | None = None) -> None:
        self.rows_per_call, self.max_rows, self.leaders = rows_per_call, max_rows, dict(leaders or {})
        self.generator = torch.Generator().manual_seed(seed)
        self.statistics: dict[str, LayerStatistics] = {}
        self.chunk = 0
        self._draws: dict[str, list[int]] = {}

    def add(self, layer: str, x: Tensor) -> None:
        """Fold the input ``x`` [..., K] of one call.

        Raises:
            CalibrationError: when it has NaN or infinity.
        """
        if (leader := self.leaders.get(layer)) is not None:
            self._follow(layer, leader)
            return
        self._draws[layer] = []
        rows = x.detach().reshape(-1, x.shape[-1])
        if not len(rows):
            return
        low, high = rows.amin(0).float().cpu(), rows.amax(0).float().cpu()
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            call = current_call()
            where = f" in call {call.index} (chunk {call.chunk}, {call.kind})" if call else ""
            raise CalibrationError(f"layer {layer}: its input has NaN or infinity{where}; check inputs and dtype")
        count = len(rows)
        if count > self.rows_per_call:
            self._draws[layer].append(count)
            index = torch.randperm(count, generator=self.generator)[: self.rows_per_call]
            rows = rows[index.to(rows.device)]
        kept, chunks = rows.cpu().clone(), torch.full((len(rows),), self.chunk)
        if (old := self.statistics.get(layer)) is not None:
            low, high = torch.minimum(low, old.low), torch.maximum(high, old.high)
            kept, chunks, count = torch.cat((old.rows, kept)), torch.cat((old.chunks, chunks)), count + old.seen
        if len(kept) > 2 * self.max_rows:
            self._draws[layer].append(len(kept))
            kept, chunks = self._thin(kept, chunks)
        self.statistics[layer] = LayerStatistics(low=low, high=high, rows=kept, chunks=chunks, seen=count)

    def _follow(self, layer: str, leader: str) -> None:
        """Take the leader's statistics, and as many random numbers as a sample of its own would have."""
        for count in self._draws[leader]:
            torch.randperm(count, generator=self.generator)
        if leader in self.statistics:
            self.statistics[layer] = self.statistics[leader]

    def _thin(self, rows: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.randperm(len(rows), generator=self.generator)[: self.max_rows].sort().values
        return rows[index], chunks[index]

    def finish(self) -> dict[str, LayerStatistics]:
        """The statistics with every sample cut to ``max_rows``."""
        for layer, s in self.statistics.items():
            if len(s.rows) > self.max_rows:
                rows, chunks = self._thin(s.rows, s.chunks)
                self.statistics[layer] = dataclasses.replace(s, rows=rows, chunks=chunks)
        for layer in self.statistics.keys() & self.leaders.keys():
            self.statistics[layer] = self.statistics[self.leaders[layer]]
        return self.statistics


class _Observer(fx.Interpreter):
    """Runs the graph as it is and shows the collector the input of every planned linear."""

    def __init__(self, module: fx.GraphModule, collector: Collector) -> None:
        super().__init__(module)
        self.collector = collector
        self.layers = {
            node: plan.layer
            for node in module.graph.nodes
            if (plan := plan_of(node)) is not None and plan.scheme is not None
        }

    def run_node(self, n: fx.Node) -> Any:
        if (layer := self.layers.get(n)) is not None:
            x = n.args[0]
            assert isinstance(x, fx.Node)
            self.collector.add(layer, self.env[x])
        return super().run_node(n)


def observed(module: fx.GraphModule, collector: Collector) -> Callable[..., Any]:
    """A callable like ``module`` that also feeds ``collector``."""
    observer, sizes = _Observer(module, collector), input_sizes(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        call_ = current_call()
        if call_ is not None:
            collector.chunk = call_.chunk
        flat = flatten_call(module, args, kwargs)
        check_sizes(module, sizes, flat)
        return module.graph.process_outputs(observer.run(*flat, enable_io_processing=False))

    return call


def calibrate(
    graph: QuantGraph,
    loader: Iterable[Any] | Rollout | None,
    forward_loop: Callable[[Callable[..., Any]], None] | None,
    collector: Collector,
    on_progress: OnProgress | None = None,
) -> str:
    """Collect statistics of every planned linear into ``graph.statistics``.

    Args:
        graph: a PLANNED graph.
        loader: batches, or a rollout whose every (condition, draws) is generated; exactly one of it and
        forward_loop: a closure that calls the given callable as it would the model.
        collector: bounds and seed.
        on_progress: told the work done.

    Returns:
        sha256 of what was collected, the calibration hash of manifests.

    Raises:
        CalibrationError: no data, data that does not fit, values that are not finite, or a planned layer that
            received no row.
    """
    run = observed(graph.module, collector)
    done = 0
    with torch.no_grad():
        if forward_loop is not None:
            forward_loop(run)
        elif isinstance(loader, Rollout):
            total = sum(loader.units(c, d) for c, d in loader.batches)
            with loader.using(run):
                for condition, draws in loader.batches:
                    state = loader.begin(condition, draws)
                    for _ in range(loader.units(condition, draws)):
                        state = loader.advance(state)
                        done += 1
                        if on_progress:
                            on_progress(done, total)
        else:
            assert loader is not None
            length = operator.length_hint(loader) or None
            for item in loader:
                batch = as_batch(item)
                collector.chunk = batch.chunk
                try:
                    run(*batch.args, **batch.kwargs)
                except CalibrationError:
                    raise
                except Exception as error:
                    shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in batch.args]
                    shapes += [f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in batch.kwargs.items()]
                    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                    raise CalibrationError(
                        f"calibration batch {done} does not fit the captured model: {reason}. Its inputs: {shapes}"
                    ) from error
                done += 1
                if on_progress:
                    on_progress(done, length)
            if not done:
                raise CalibrationError("the calibration loader yielded no batch; static scales need at least one")
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


def statistics_hash(statistics: Mapping[str, LayerStatistics]) -> str:
    """sha256 over layer names, extremes and sampled rows."""
    digest = hashlib.sha256()
    for layer in sorted(statistics):
        s = statistics[layer]
        digest.update(f"{layer}:{s.seen}:{tuple(s.rows.shape)}".encode())
        for tensor in (s.low, s.high, s.rows):
            digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
