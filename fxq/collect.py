"""What calibration keeps of the inputs of linears: exact extremes and a bounded sample of rows."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxq.ir import LayerStatistics
from fxq.residency import give_back, mapped_tensor
from fxq.rollout import current_call
from fxq.workers import Workers


class CalibrationError(ValueError):
    """Calibration data that is missing, misshapen, not finite or that never reaches a planned layer."""


_Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


class _Sample:
    """A bounded sample of rows of one layer.

    Every row has a place (batch, call of the batch) and a random priority drawn for that place alone; the rows of least
    priority stay. So the sample does not depend on the order of batches or on who saw them: two samples merge exactly.
    """

    def __init__(self, rows: Tensor, limit: int, slack: int, allocate: _Allocate) -> None:
        self.limit, self.capacity, self.allocate = limit, limit + slack, allocate
        self.rows = allocate((min(self.capacity, 4 * len(rows) + 64), rows.shape[1]), rows.dtype)
        self.marks = torch.empty(0, 3, dtype=torch.int64)  # place, chunk, priority
        self.count = 0

    def add(self, rows: Tensor, marks: Tensor) -> None:
        """Add rows with their marks, at most ``slack`` of them."""
        if self.count + len(rows) > self.capacity:
            self.thin()
        needed = self.count + len(rows)
        if needed > len(self.rows):
            larger = self.allocate((min(self.capacity, 2 * needed), rows.shape[1]), self.rows.dtype)
            larger[: self.count] = self.rows[: self.count]
            self.rows = larger
        self.rows[self.count : needed] = rows
        self.marks = torch.cat((self.marks, marks))
        self.count = needed

    def thin(self) -> None:
        """Keep the rows of least priority, in order of their places."""
        order = self.marks[:, 0].argsort(stable=True)
        if len(order) > self.limit:
            kept = self.marks[order, 2].argsort(stable=True)[: self.limit].sort().values
            order = order[kept]
        if not torch.equal(order, torch.arange(self.count)):
            self.rows[: len(order)] = self.rows[order]
            self.marks = self.marks[order]
            self.count = len(order)


class Collector:
    """Folds input rows of layers: exact extremes, and a seeded sample of at most ``max_rows`` rows a layer.

    ``leaders`` maps layers to one that is called before them on the same input: they get its statistics, stored once.
    With a ``folder`` the rows lie in files there, which leave no trace; ``batch`` and ``chunk`` are set by whoever
    drives the model.
    """

    def __init__(
        self,
        rows_per_call: int,
        max_rows: int,
        seed: int,
        leaders: Mapping[str, str] | None = None,
        folder: pathlib.Path | None = None,
    ) -> None:
        self.rows_per_call, self.max_rows, self.seed = rows_per_call, max_rows, seed
        self.leaders = dict(leaders or {})
        self.folder = folder
        self.batch = self.chunk = 0
        self._samples: dict[str, _Sample] = {}
        self._extremes: dict[str, tuple[Tensor, Tensor]] = {}
        self._seen: dict[str, int] = {}
        self._calls: dict[str, tuple[int, int]] = {}

    def add(self, layer: str, x: Tensor) -> None:
        """Fold the input ``x`` [..., K] of one call.

        Raises:
            CalibrationError: when it has NaN or infinity.
        """
        if layer in self.leaders:
            return
        batch, call = self._calls.get(layer, (self.batch, -1))
        call = call + 1 if batch == self.batch else 0
        self._calls[layer] = (self.batch, call)
        rows = x.detach().reshape(-1, x.shape[-1])
        if not len(rows):
            return
        low, high = rows.amin(0).float().cpu(), rows.amax(0).float().cpu()
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            current = current_call()
            where = f" in call {current.index} (chunk {current.chunk}, {current.kind})" if current else ""
            raise CalibrationError(f"layer {layer}: its input has NaN or infinity{where}; check inputs and dtype")
        self._seen[layer] = self._seen.get(layer, 0) + len(rows)
        self._widen(layer, low, high)
        place = (self.batch << 32) + call
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + place) % (2**63 - 1))
        if len(rows) > self.rows_per_call:
            index = torch.randperm(len(rows), generator=generator)[: self.rows_per_call].sort().values
            rows = rows[index.to(rows.device)]
        priority = torch.randint(2**62, (len(rows),), generator=generator)
        marks = torch.stack((torch.full_like(priority, place), torch.full_like(priority, self.chunk), priority), 1)
        self._take(layer, rows.cpu(), marks)

    def _widen(self, layer: str, low: Tensor, high: Tensor) -> None:
        if (old := self._extremes.get(layer)) is not None:
            low, high = torch.minimum(low, old[0]), torch.maximum(high, old[1])
        self._extremes[layer] = low, high

    def _take(self, layer: str, rows: Tensor, marks: Tensor) -> None:
        if layer not in self._samples:
            slack = max(self.max_rows // 4, self.rows_per_call)
            self._samples[layer] = _Sample(rows, self.max_rows, slack, self._allocate)
        for start in range(0, len(rows), self.rows_per_call):
            part = slice(start, start + self.rows_per_call)
            self._samples[layer].add(rows[part], marks[part])

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.folder is None:
            return torch.empty(shape, dtype=dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rows-", dir=self.folder) as folder:
            return mapped_tensor(pathlib.Path(folder, "rows"), shape, dtype)

    def give_back(self) -> None:
        """Take the rows that lie in files out of memory."""
        if self.folder is not None:
            give_back(*(sample.rows for sample in self._samples.values()))

    def merge(self, workers: Workers) -> None:
        """Make this the collector of all ranks' rows: the same as one that saw every batch itself.

        Raises:
            fxq.workers.WorkerError: when a rank is gone.
        """
        told = workers.gather({layer: torch.tensor(count) for layer, count in self._seen.items()})
        for layer in sorted({layer for seen in told for layer in seen}):
            for rank, state in enumerate(workers.gather(self._state(layer))):
                if state and rank != workers.rank:
                    self._seen[layer] = self._seen.get(layer, 0) + int(told[rank][layer])
                    self._widen(layer, state["low"], state["high"])
                    self._take(layer, state["rows"], state["marks"])

    def _state(self, layer: str) -> dict[str, Tensor]:
        if (sample := self._samples.get(layer)) is None:
            return {}
        sample.thin()
        low, high = self._extremes[layer]
        return {"low": low, "high": high, "rows": sample.rows[: sample.count], "marks": sample.marks}

    def finish(self) -> dict[str, LayerStatistics]:
        """The statistics, every sample cut to ``max_rows`` and in order of batches and calls."""
        statistics = {}
        for layer, sample in self._samples.items():
            sample.thin()
            low, high = self._extremes[layer]
            statistics[layer] = LayerStatistics(
                low=low, high=high, rows=sample.rows[: sample.count], chunks=sample.marks[:, 1], seen=self._seen[layer]
            )
        followers = {layer: statistics[leader] for layer, leader in self.leaders.items() if leader in statistics}
        return statistics | followers
