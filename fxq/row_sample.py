"""A bounded sample of rows that stands for all of them, rare ones included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]

_PLACE, _CHUNK, _DRAW, _SIZE, _STRATUM = range(5)  # columns of a sample's marks
_RESOLUTION = 1 << 53  # of draws
_RESERVE = 64  # rows kept of every stratum
_ZERO = -10_000  # stratum of rows of zeros


def strata(rows: Tensor) -> Tensor:
    """Half the binary exponent of each row's L2 norm, int64 [R] on the CPU: rows of one stratum differ fourfold.

    Args:
        rows: finite floats [R, K] of any unit.
    """
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double()
    odd = (~norms.isfinite() | (norms < 1e-15)).nonzero().flatten()  # squares that leave the range of float32
    if len(odd):
        norms[odd] = torch.linalg.vector_norm(rows[odd], dim=1, dtype=torch.float64)
    norms = norms.cpu()
    exponents = torch.frexp(norms).exponent.long().div(2, rounding_mode="floor")
    return torch.where(norms > 0, exponents, _ZERO)


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
        self._least: dict[int, Tensor] = {}  # by stratum the least draws, one more than the reserve
        self._bound = 1.0  # of draw / share: no row at or above it is kept for its call's share
        self._rows: Tensor | None = None
        self._marks = torch.empty(0, 5, dtype=torch.int64, device="cpu")

    @property
    def rows(self) -> Tensor:
        """The rows kept so far [R, K], more than will be at the end."""
        assert self._rows is not None
        return self._rows[: len(self._marks)]

    @property
    def seen(self) -> int:
        """Number of rows offered."""
        return sum(self.counts.values())

    def add(self, rows: Tensor, place: int, chunk: int, seed: int) -> None:
        """Offer the rows [R, K] of a call."""
        size = len(rows)
        generator = torch.Generator(device="cpu").manual_seed((seed * 1_000_003 + place) % (2**63 - 1))
        rank = torch.randperm(size, generator=generator, device="cpu")
        jitter = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
        draw = ((rank + jitter) * (_RESOLUTION / size)).long().clamp_(max=_RESOLUTION - 1)
        stratum = strata(rows)
        marks = torch.stack(
            (torch.full_like(draw, place), torch.full_like(draw, chunk), draw, torch.full_like(draw, size), stratum), 1
        )
        for number, count in zip(*(t.tolist() for t in stratum.unique(return_counts=True)), strict=True):
            self.counts[number] = self.counts.get(number, 0) + count
        wanted = self._reserved(marks) | ((rank < self.rows_per_call) & (self._priority(marks) < self._bound))
        index = wanted.nonzero().flatten()
        self._append(rows[index.to(rows.device)].cpu() if len(index) < size else rows.cpu(), marks[index])

    def state(self) -> dict[str, Tensor]:
        """What :meth:`merge` needs of it."""
        self._thin()
        counts = torch.tensor(sorted(self.counts.items()), dtype=torch.int64, device="cpu")
        return {"rows": self.rows, "marks": self._marks, "counts": counts}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take the rows of another sample of the same layer and settings."""
        for number, count in state["counts"].tolist():
            self.counts[number] = self.counts.get(number, 0) + count
        self._reserved(state["marks"])
        for rows, marks in zip(state["rows"].split(4096), state["marks"].split(4096), strict=True):
            self._append(rows, marks)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [R, K] in order of their places, their chunks int64 [R], and how many rows each stands for, float32."""
        self._thin()
        marks, strata_seen = self._marks, sorted(self.counts)
        draw, share, priority = marks[:, _DRAW].double() / _RESOLUTION, self._share(marks), self._priority(marks)
        least = torch.empty(len(marks), dtype=torch.float64, device="cpu")
        reserve = min(self.reserve, self.limit // (2 * len(strata_seen)))
        for number in strata_seen:
            found = self._least[number]
            bound = float(found[reserve]) / _RESOLUTION if self.counts[number] > reserve else 1.0
            least[marks[:, _STRATUM] == number] = bound
        kept = draw < least
        others = priority[~kept & (priority < 1)].sort().values
        room = self.limit - int(kept.sum())
        bound = float(others[room]) if len(others) > room else 1.0
        kept |= priority < bound
        weights = 1 / torch.maximum(least, bound * share).clamp(max=1.0)
        kept_rows = kept.nonzero().flatten()
        self._keep(kept_rows)
        weights = self._calibrated(weights[kept_rows])
        return self.rows, self._marks[:, _CHUNK].clone(), weights.float()

    def _calibrated(self, weights: Tensor) -> Tensor:
        """The weights scaled so that those of each stratum add up to the rows seen of it, and all to all rows."""
        for number, count in self.counts.items():
            inside = self._marks[:, _STRATUM] == number
            if total := float(weights[inside].sum()):
                weights[inside] *= count / total
        return weights * (self.seen / float(weights.sum()))

    def _share(self, marks: Tensor) -> Tensor:
        return (self.rows_per_call / marks[:, _SIZE].double()).clamp(max=1.0)

    def _priority(self, marks: Tensor) -> Tensor:
        return marks[:, _DRAW].double() / _RESOLUTION / self._share(marks)

    def _reserved(self, marks: Tensor) -> Tensor:
        """Bring the least draws of the strata up to date; which rows are among them, bool [R]."""
        reserved = torch.zeros(len(marks), dtype=torch.bool, device="cpu")
        for number in marks[:, _STRATUM].unique().tolist():
            inside = (marks[:, _STRATUM] == number).nonzero().flatten()
            draws, most = marks[inside, _DRAW], self.reserve + 1
            found = draws.topk(most, largest=False, sorted=False).values if len(draws) > most else draws
            if (old := self._least.get(number)) is not None:
                found = torch.cat((old, found))
            self._least[number] = found = found.sort().values[:most]
            reserved[inside] = draws <= found[-1]
        return reserved

    def _append(self, rows: Tensor, marks: Tensor) -> None:
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
        self._marks = torch.cat((self._marks, marks))

    def _thin(self) -> None:
        """Let go of rows that cannot be in the sample any more, and bring the rest into the order of their places."""
        priority = self._priority(self._marks)
        inside = priority[priority < 1]
        if len(inside) > self.limit + 1:
            self._bound = min(self._bound, float(inside.kthvalue(self.limit + 2).values))
        wanted = self._reserved_now() | (priority < self._bound)
        index = wanted.nonzero().flatten()
        self._keep(index[self._marks[index, _PLACE].argsort(stable=True)])

    def _reserved_now(self) -> Tensor:
        bounds = torch.full((len(self._marks),), -1, dtype=torch.int64, device="cpu")
        for number, found in self._least.items():
            bounds[self._marks[:, _STRATUM] == number] = found[-1]
        return self._marks[:, _DRAW] <= bounds

    def _keep(self, index: Tensor) -> None:
        if not torch.equal(index, torch.arange(len(self._marks), device="cpu")):
            assert self._rows is not None
            self._rows[: len(index)] = self._rows[index]
            self._marks = self._marks[index]
