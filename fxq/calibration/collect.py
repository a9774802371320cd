"""What calibration keeps of the inputs of linears: exact extremes and a bounded, weighted sample of rows."""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor

from fxq.calibration.attention_errors import AttentionErrors
from fxq.calibration.rollout import current_call
from fxq.calibration.row_sample import RowSample, measure, row_limit
from fxq.core.method import LayerStatistics
from fxq.core.rows import RowSums
from fxq.runtime.memory.residency import give_back, mapped_tensor
from fxq.runtime.workers import Workers


class CalibrationError(ValueError):
    """Calibration data that is missing, misshapen, not finite or that never reaches a planned layer."""


def _allocate_on(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


_TOUCHED = 1 << 26  # bytes of rows in files that may be in memory
_STORED = (torch.float32, torch.bfloat16, torch.float16)


class Collector:
    """Folds input rows of layers: exact extremes, and a seeded sample of at most ``max_rows`` rows a layer.

    None stands for :func:`~fxq.calibration.row_sample.row_limit` of its width.

    The sample (:class:`~fxq.calibration.row_sample.RowSample`) has about ``rows_per_call`` rows of each call, and every
    row that is rare for its size.

    ``leaders`` maps layers to one that is called before them on the same input: they get its statistics, stored once.
    With a ``folder`` the rows lie in files there, which leave no trace; ``batch`` and ``chunk`` are set by whoever
    drives the model. ``attention`` measures what attentions in integers would change, None: nothing does. With
    ``all_rows`` layers have sums over all rows besides (:class:`~fxq.core.rows.RowSums`).
    """

    def __init__(
        self,
        rows_per_call: int,
        max_rows: int | None,
        seed: int,
        leaders: Mapping[str, str] | None = None,
        folder: pathlib.Path | None = None,
        all_rows: bool = False,
    ) -> None:
        self.rows_per_call, self.max_rows, self.seed = rows_per_call, max_rows, seed
        self.leaders = dict(leaders or {})
        self.folder, self.all_rows = folder, all_rows
        self.batch = self.chunk = 0
        self.attention: AttentionErrors | None = None
        self._samples: dict[str, RowSample] = {}
        self._extremes: dict[str, tuple[Tensor, Tensor]] = {}
        self._sums: dict[str, RowSums] = {}
        self._calls: dict[str, tuple[int, int]] = {}
        self._gradients = False
        self._touched = 0  # bytes of rows that may be in memory

    def add(self, layer: str, x: Tensor, gradients: Tensor | None = None) -> None:
        """Fold the input ``x`` [..., K] of one call, with ``gradients`` [rows of x].

        Raises:
            CalibrationError: when it has NaN or infinity.
        """
        if layer in self.leaders:
            return
        batch, call = self._calls.get(layer, (self.batch, -1))
        call = call + 1 if batch == self.batch else 0
        self._calls[layer] = (self.batch, call)
        rows = x.detach().reshape(-1, x.shape[-1])
        if not rows.numel():
            return
        if rows.dtype not in _STORED:
            rows = rows.float()
        low, high, norms = measure(rows)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise CalibrationError(
                f"layer {layer}: its input has NaN or infinity{self._where()}; check inputs and dtype"
            )
        self._widen(layer, low, high)
        self._gradients |= gradients is not None
        sample = self._sample(layer, rows.shape[1])
        sample.add(rows, norms, (self.batch << 32) + call, self.chunk, self.seed, gradients)
        if self.all_rows:
            self._sums_of(layer, rows, gradients is not None).add(rows, gradients)
        self._touched += sample.stored.nbytes
        if self._touched > _TOUCHED:
            self.give_back()

    def _where(self) -> str:
        if (current := current_call()) is not None:
            return f" in batch {self.batch}, call {current.index} (chunk {current.chunk}, {current.kind})"
        return f" in batch {self.batch}"

    def _widen(self, layer: str, low: Tensor, high: Tensor) -> None:
        if (old := self._extremes.get(layer)) is not None:
            low, high = torch.minimum(low, old[0]), torch.maximum(high, old[1])
        self._extremes[layer] = low, high

    def _sample(self, layer: str, width: int) -> RowSample:
        if layer not in self._samples:
            limit = row_limit(width) if self.max_rows is None else self.max_rows
            self._samples[layer] = RowSample(limit, self.rows_per_call, self.allocate)
        return self._samples[layer]

    def _sums_of(self, layer: str, rows: Tensor, gradients: bool) -> RowSums:
        if layer not in self._sums:
            on_cpu = rows.device.type == "cpu"
            allocate = self.allocate if on_cpu else functools.partial(_allocate_on, rows.device)
            self._sums[layer] = RowSums(rows.shape[1], gradients, allocate)
        return self._sums[layer]

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any values on the CPU, in a file of the ``folder`` if there is one."""
        if self.folder is None:
            return torch.empty(shape, dtype=dtype, device="cpu")
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rows-", dir=self.folder) as folder:
            return mapped_tensor(pathlib.Path(folder, "rows"), shape, dtype)

    def give_back(self) -> None:
        """Take the rows that lie in files out of memory."""
        self._touched = 0
        if self.folder is not None:
            give_back(*(sample.stored for sample in self._samples.values()))
            give_back(*(sums.squares for sums in self._sums.values()))

    def merge(self, workers: Workers) -> None:
        """Make this the collector of all ranks' rows: the same as one that saw every batch itself.

        Raises:
            fxq.runtime.workers.WorkerError: when a rank is gone.
        """
        told = workers.gather({layer: torch.tensor(1, device="cpu") for layer in self._samples})
        for layer in sorted({layer for known in told for layer in known}):
            for rank, state in enumerate(workers.gather(self._state(layer))):
                if state and rank != workers.rank:
                    self._widen(layer, state["low"], state["high"])
                    self._sample(layer, state["rows"].shape[1]).merge(state)
                    if self.all_rows:
                        self._sums_of(layer, state["rows"], len(state["squares"]) > 1).merge(state)
        if self.attention is not None:
            self.attention.merge(workers)

    def _state(self, layer: str) -> dict[str, Tensor]:
        if (sample := self._samples.get(layer)) is None:
            return {}
        low, high = self._extremes[layer]
        sums = self._sums[layer].state() if self.all_rows else {}
        return {"low": low, "high": high, **sample.state(), **sums}

    def finish(self) -> dict[str, LayerStatistics]:
        """The statistics, every sample cut to ``max_rows`` and in order of batches and calls."""
        statistics = {}
        for layer, sample in self._samples.items():
            low, high = self._extremes[layer]
            rows, chunks, weights, gradients = sample.finish()
            if self.folder is not None:
                give_back(sample.stored)
            statistics[layer] = LayerStatistics(
                low=low,
                high=high,
                rows=rows,
                chunks=chunks,
                weights=weights,
                gradients=gradients if self._gradients else None,
                seen=sample.seen,
                sums=self._sums.get(layer),
            )
        followers = {layer: statistics[leader] for layer, leader in self.leaders.items() if leader in statistics}
        return statistics | followers
