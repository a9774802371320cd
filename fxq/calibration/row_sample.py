"""A bounded sample of rows that stands for all of them, rare ones included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

_PLACE, _CHUNK, _DRAW, _SIZE, _STRATUM, _GRADIENT = range(6)  # columns of a sample's marks; the last are bits
_LEAST_ROWS, _MOST_ROWS = 1 << 14, 1 << 16
_VALUES = 24 << 20  # of a sample that may have more than the least rows
_RESOLUTION = 2.0**53  # of draws
_RESERVE = 64  # rows kept of every stratum
_ZERO = -10_000  # stratum of rows of zeros
_BLOCK = 1 << 20  # values measured at a time: their float32 copy stays in the cache
_LARGE_BLOCK = 1 << 26  # the same elsewhere than on a CPU, where many calls cost more


def row_limit(width: int) -> int:
    """Most rows that a sample of an input of ``width`` channels has where nobody says how many.

    65536; of more than 384 channels as many as make 24 Mi values, and at least 16384.
    """
    return max(_LEAST_ROWS, min(_MOST_ROWS, _VALUES // width))


def measure(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Extremes of each channel, float32 [K], and the L2 norm of each row, float64 [R], all on the CPU.

    Args:
        rows: floats [R, K] of any unit, R and K at least 1; NaN and infinity are seen in the extremes.
    """
    lows, highs, norms = [], [], []
    most = _BLOCK if rows.device.type == "cpu" else _LARGE_BLOCK
    for part in rows.split(max(1, most // rows.shape[1])):
        block = part.float()
        lows.append(block.amin(0))
        highs.append(block.amax(0))
        found = torch.linalg.vector_norm(block, dim=1)
        odd = ((found < 1e-15) | ~found.isfinite()).nonzero().flatten()  # squares that leave the range of float32
        if len(odd):
            found = found.double()
            found[odd] = torch.linalg.vector_norm(block[odd].double(), dim=1)
        norms.append(found.double())
    return torch.stack(lows).amin(0).cpu(), torch.stack(highs).amax(0).cpu(), torch.cat(norms).cpu()


def strata(norms: Tensor) -> Integers:
    """Half the binary exponent of each norm, [R]: rows of one stratum differ fourfold."""
    exponents = np.frexp(norms.numpy())[1].astype(np.int64) // 2
    return np.where(norms.numpy() > 0, exponents, _ZERO)


class RowSample:
    """At most ``limit`` rows of one layer's inputs with the number of rows that each stands for.

    Every row has a draw u, uniform in 0..1, which depends on the seed and on the row's place (batch, call, row) alone.
    A row of a call with n rows is kept where ``u < T * min(1, rows_per_call / n)``, so that every call has the same
    share of the sample, or where u is among the least of its stratum (rows whose norms are alike): a row that is rare
    for its size is always there. T and the strata's bounds are what makes ``limit`` rows. The probability of a row to
    be kept is then known, and its weight is the inverse, scaled so that each stratum counts as many rows as were seen
    of it (Horvitz and Thompson, with post-stratification). Sums over weighted rows are therefore free of bias by the
    order of batches, by sizes of calls and by rare rows; and nothing depends on who saw a row, so two samples merge
    exactly.
    """

    def __init__(self, limit: int, rows_per_call: int, allocate: Allocate) -> None:
        self.limit, self.rows_per_call, self.allocate = limit, rows_per_call, allocate
        self.reserve = max(1, min(_RESERVE, limit // 32))
        self.counts: dict[int, int] = {}
        self._least: dict[int, Integers] = {}  # by stratum the least draws, one more than the reserve
        self._bound = 1.0  # of draw / share: no row at or above it is kept for its call's share
        self._rows: Tensor | None = None
        self._marks: Integers = np.empty((0, 6), np.int64)

    @property
    def rows(self) -> Tensor:
        """The rows kept so far [R, K], more than will be at the end."""
        assert self._rows is not None
        return self._rows[: len(self._marks)]

    @property
    def stored(self) -> Tensor:
        """All that is allocated, :attr:`rows` and room behind them that may have been written to."""
        assert self._rows is not None
        return self._rows

    @property
    def seen(self) -> int:
        """Number of rows offered."""
        return sum(self.counts.values())

    def add(
        self, rows: Tensor, norms: Tensor, place: int, chunk: int, seed: int, gradients: Tensor | None = None
    ) -> None:
        """Offer the rows [R, K] of a call, with their norms as :func:`measure` gives them.

        Args:
            rows: of the input.
            norms: float64 [R].
            place: batch and call.
            chunk: of the call.
            seed: of the draws.
            gradients: [R], kept beside the rows; None: ones.
        """
        size = len(rows)
        generator = np.random.default_rng((seed % 2**63, place))
        rank = generator.permutation(size)
        marks = np.empty((size, 6), np.int64)
        marks[:, _GRADIENT] = (np.ones(size) if gradients is None else gradients.double().numpy()).view(np.int64)
        marks[:, _PLACE], marks[:, _CHUNK], marks[:, _SIZE], marks[:, _STRATUM] = place, chunk, size, strata(norms)
        marks[:, _DRAW] = np.minimum((rank + generator.random(size)) * (_RESOLUTION / size), _RESOLUTION - 1)
        for number, count in zip(*(a.tolist() for a in np.unique(marks[:, _STRATUM], return_counts=True)), strict=True):
            self.counts[number] = self.counts.get(number, 0) + count
        wanted = self._reserved(marks) | ((rank < self.rows_per_call) & (self._priority(marks) < self._bound))
        index = wanted.nonzero()[0]
        kept = rows if len(index) == size else rows[torch.from_numpy(index).to(rows.device)]
        self._append(kept.cpu(), marks[index])

    def state(self) -> dict[str, Tensor]:
        """What :meth:`merge` needs of it."""
        self._thin()
        counts = torch.from_numpy(np.array(sorted(self.counts.items()), np.int64))
        return {"rows": self.rows, "marks": torch.from_numpy(self._marks), "counts": counts}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take the rows of another sample of the same layer and settings."""
        for number, count in state["counts"].tolist():
            self.counts[number] = self.counts.get(number, 0) + count
        self._reserved(state["marks"].numpy())
        for rows, marks in zip(state["rows"].split(4096), state["marks"].split(4096), strict=True):
            self._append(rows, marks.numpy())

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows [R, K] in order of their places, with values [R] of each.

        Returns:
            Rows, chunks int64, how many rows each stands for float32, and what was kept beside them float32.
        """
        self._thin()
        marks, share, priority = self._marks, self._share(self._marks), self._priority(self._marks)
        reserve = min(self.reserve, self.limit // (2 * len(self.counts)))
        least = np.ones(len(marks))
        for number, count in self.counts.items():
            if count > reserve:
                least[marks[:, _STRATUM] == number] = self._least[number][reserve] / _RESOLUTION
        kept = marks[:, _DRAW] / _RESOLUTION < least
        others = np.sort(priority[~kept & (priority < 1)])
        room = self.limit - int(kept.sum())
        bound = float(others[room]) if len(others) > room else 1.0
        kept |= priority < bound
        weights = 1 / np.minimum(np.maximum(least, bound * share), 1.0)
        self._keep(kept.nonzero()[0])
        counts = torch.from_numpy(self._calibrated(weights[kept])).float()
        gradients = torch.from_numpy(self._marks[:, _GRADIENT].copy().view(np.float64)).float()
        return self.rows, torch.from_numpy(self._marks[:, _CHUNK].copy()), counts, gradients

    def _calibrated(self, weights: Floats) -> Floats:
        """The weights scaled so that those of each stratum add up to the rows seen of it, and all to all rows."""
        for number, count in self.counts.items():
            inside = self._marks[:, _STRATUM] == number
            if total := float(weights[inside].sum()):
                weights[inside] *= count / total
        return weights * (self.seen / float(weights.sum()))

    def _share(self, marks: Integers) -> Floats:
        share: Floats = np.minimum(self.rows_per_call / marks[:, _SIZE], 1.0)
        return share

    def _priority(self, marks: Integers) -> Floats:
        priority: Floats = marks[:, _DRAW] / _RESOLUTION / self._share(marks)
        return priority

    def _reserved(self, marks: Integers) -> NDArray[np.bool_]:
        """Bring the least draws of the strata up to date; which rows are among them, [R]."""
        reserved = np.zeros(len(marks), bool)
        most = self.reserve + 1
        for number in np.unique(marks[:, _STRATUM]).tolist():
            inside = (marks[:, _STRATUM] == number).nonzero()[0]
            draws: Any = marks[inside, _DRAW]
            found = draws if len(draws) <= most else np.partition(draws, most - 1)[:most]
            if (old := self._least.get(number)) is not None:
                found = np.concatenate((old, found))
            self._least[number] = found = np.sort(found)[:most]
            reserved[inside] = draws <= found[-1]
        return reserved

    def _append(self, rows: Tensor, marks: Integers) -> None:
        most = self.limit + 1 + max(self.limit // 4, self.rows_per_call) + len(self.counts) * (self.reserve + 1)
        if len(self._marks) + len(rows) > most:
            self._thin()
        start, needed = len(self._marks), len(self._marks) + len(rows)
        if self._rows is None or needed > len(self._rows):
            room = max(needed, min(most, 4 * len(rows) + 64 if self._rows is None else 2 * needed))
            larger = self.allocate((room, rows.shape[1]), rows.dtype)
            if self._rows is not None:
                larger[:start] = self._rows[:start]
            self._rows = larger
        self._rows[start:needed] = rows
        self._marks = np.concatenate((self._marks, marks))

    def _thin(self) -> None:
        """Let go of rows that cannot be in the sample any more, and bring the rest into the order of their places."""
        priority = self._priority(self._marks)
        inside = priority[priority < 1]
        if len(inside) > self.limit + 1:
            self._bound = min(self._bound, float(np.partition(inside, self.limit + 1)[self.limit + 1]))
        wanted = priority < self._bound
        for number, found in self._least.items():
            wanted |= (self._marks[:, _STRATUM] == number) & (self._marks[:, _DRAW] <= found[-1])
        index = wanted.nonzero()[0]
        self._keep(index[self._marks[index, _PLACE].argsort(kind="stable")])

    def _keep(self, index: Integers) -> None:
        if not np.array_equal(index, np.arange(len(self._marks))):
            assert self._rows is not None
            self._rows[: len(index)] = self._rows[torch.from_numpy(index)]
            self._marks = self._marks[index]
