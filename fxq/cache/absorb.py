"""What a layer's history contributes to its attention, absorbed into a linear map of each video (after ISPA).

ISPA (arXiv 2607.00712) solves in closed form for a change of the output projection; its equation was not at hand, so
the form here is reconstructed: a ridge regression for a map of attention's results, which lies before the projection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fxq.cache.compress import Few, compressed

MOST_DOUBLE = 512
"""Widest map whose statistics are summed in float64; wider ones take float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Absorb:
    """Layers that forget their history after some chunks and make up for it by a map of each video's own.

    Args:
        warmup: chunks after which layers are converted, once; until then every layer attends to everything.
        ratio: share of the layers that is converted at most.
        form: of the map: ``full``, one for each head, or ``full`` cut to ``rank`` components.
        rank: of a ``low_rank`` map.
        alpha: ridge, relative to the mean square of attention's results.
        most: a layer is converted when its map leaves less than this share of what evicting costs, on the last chunk of
            the warm-up, from maps fitted on those before.
        tokens: in the place of a map, so many keys and values of each head that stand for the history: the means of its
            clusters. Layers are chosen as for maps.

    Raises:
        ValueError: when a setting is out of range.
    """

    warmup: int = 5
    ratio: float = 0.5
    form: Literal["full", "per_head", "low_rank"] = "full"
    rank: int = 0
    alpha: float = 1e-2
    most: float = 0.5
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.form not in ("full", "per_head", "low_rank"):
            raise ValueError(f"form = {self.form!r}: expected 'full', 'per_head' or 'low_rank'")
        if (self.form == "low_rank") != (self.rank > 0) or self.rank < 0:
            raise ValueError(f"rank = {self.rank} with form = {self.form!r}: 'low_rank' needs 1 or more, others take 0")
        if self.tokens < 0 or (self.tokens and self.form != "full"):
            raise ValueError(f"tokens = {self.tokens} with form = {self.form!r}: expected 0, or 1 or more and 'full'")
        if self.warmup < 3 or not 0 < self.ratio <= 1 or not 0 < self.most <= 1 or not self.alpha > 0:
            raise ValueError(
                f"warmup = {self.warmup}, ratio = {self.ratio}, most = {self.most}, alpha = {self.alpha}: expected 3 "
                "or more chunks, shares above 0 and at most 1, a number above 0"
            )

    def check(self, sink: int, chunk: int) -> None:
        """Refuse what a cache with a sink of so many frames cannot follow.

        Raises:
            ValueError: naming the setting and what would do.
        """
        if not sink:
            raise ValueError(
                f"absorbed layers keep the sink and the new chunk alone: set sink to a chunk, {chunk} frames, or "
                "absorb=None"
            )
        least = sink // chunk + 3
        if self.warmup < least:
            raise ValueError(
                f"a warm-up of {self.warmup} chunks of {chunk} frames has fewer than two chunks with more behind them "
                f"than {sink} sink frames: set warmup to at least {least}"
            )

    def most_layers(self, layers: int) -> int:
        """Of so many layers, how many are converted at most."""
        return int(self.ratio * layers + 1e-9)

    def groups(self, heads: int) -> int:
        """Blocks of channels with a map of their own."""
        return heads if self.form == "per_head" else 1


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over rows of one layer: ``gram`` of local attention's results, ``cross`` of them with what they lack.

    Both are [B, groups, width, width].
    """

    gram: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, batch: int, groups: int, width: int, device: torch.device) -> Statistics:
        """Of no row."""
        dtype = torch.float64 if width <= MOST_DOUBLE else torch.float32
        none = torch.zeros(batch, groups, width, width, dtype=dtype, device=device)
        return cls(none, none)

    def added(self, local: Tensor, full: Tensor) -> Statistics:
        """With rows of attention to sink and new tokens, and of attention to everything, [B, S, dim] each."""

        def rows(x: Tensor) -> Tensor:
            grouped = x.to(self.gram.dtype).unflatten(2, (self.gram.shape[1], self.gram.shape[2]))
            return grouped.transpose(1, 2)  # [B, groups, S, width]

        a, lacking = rows(local), rows(full) - rows(local)
        return Statistics(self.gram + a.mT @ a, self.cross + a.mT @ lacking)

    def pooled(self) -> Statistics:
        """Those of all videos together, as one."""
        return Statistics(self.gram.sum(0, keepdim=True), self.cross.sum(0, keepdim=True))


def solve(found: Statistics, alpha: float, rank: int = 0, prior: Tensor | None = None) -> Tensor:
    """The map M that minimises ``|A_local (1 + M) - A_full|^2 + l |M - prior|^2``, ``l = alpha trace(gram) / width``.

    Args:
        found: of the rows.
        alpha: ridge.
        rank: components that are kept, 0: all.
        prior: map [1 or B, groups, width, width] of other videos; None: zero.

    Returns:
        float32 [B, groups, width, width]; not finite where there is no solution.
    """
    gram, cross = found.gram.double(), found.cross.double()
    width = gram.shape[-1]
    ridge = alpha * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = ridge.clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(width, dtype=torch.float64, device=gram.device)
    right = cross if prior is None else cross + ridge * prior.double()
    for _ in range(5):
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
        if not bool(failed.any()):
            break
        ridge = torch.where(failed[..., None, None] > 0, 10 * ridge, ridge)
    solution = torch.cholesky_solve(right, factor)
    solution = torch.where(failed[..., None, None] > 0, torch.nan, solution)
    if rank and bool(solution.isfinite().all()):
        u, s, v = torch.linalg.svd(solution)
        solution = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return solution.float()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a layer's map did on the chunk that was held out; means over videos, after the output projection.

    Attributes:
        left: error with the map as a share of that without.
        relative: error with the map as a share of the result's energy.
        converted: whether the layer forgets its history.
    """

    left: float
    relative: float
    converted: bool


@dataclasses.dataclass(frozen=True)
class Absorption:
    """Where a rollout stands with absorbing. Immutable; made anew for every video.

    Attributes:
        settings: what is to be done.
        maps: per layer, the graph's inputs float32 [B, groups, width, width]; zero for layers with their history.
        statistics: per layer.
        trial: per layer, the map that the last chunk of the warm-up measures; empty before.
        sums: per layer float64 [3, B]: squared errors with the map and without it, and the result's squares.
        few: per layer, the keys and values that stand for its history; of length 0 for layers with their history.
        priors: per layer, the map that ridge draws towards; empty: zero.
        verdicts: per layer; empty until layers are converted.
    """

    settings: Absorb
    maps: tuple[Tensor, ...]
    statistics: tuple[Statistics, ...]
    few: tuple[Few, ...] = ()
    trial: tuple[Tensor, ...] = ()
    sums: tuple[Tensor, ...] = ()
    priors: tuple[Tensor, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    @classmethod
    def begin(
        cls, settings: Absorb, layers: int, heads: int, like: Tensor, priors: Sequence[Tensor] = ()
    ) -> Absorption:
        """At a video's start.

        Args:
            settings: what is to be done.
            layers: of the model.
            heads: of a layer.
            like: tensor [B, T, heads, head_dim] of the cache.
            priors: see :class:`Absorption`.
        """
        groups = settings.groups(heads)
        width = heads * like.shape[3] // groups
        none = Statistics.zeros(like.shape[0], groups, width, like.device)
        zero = torch.zeros(like.shape[0], groups, width, width, dtype=torch.float32, device=like.device)
        few = (Few.none(like),) * layers
        return cls(settings, (zero,) * layers, (none,) * layers, few, priors=tuple(priors))

    def observes(self, chunk: int, history: bool) -> bool:
        """Whether the calls of a chunk are to be seen; ``history``: there is more than the sink behind it."""
        return history and chunk < self.settings.warmup

    def entering(self, chunk: int) -> Absorption:
        """Before the calls of a chunk: the last of the warm-up measures the maps of those before."""
        if chunk != self.settings.warmup - 1:
            return self
        trial = self._solved()
        zeros = torch.zeros(3, len(trial[0]), dtype=torch.float64, device=trial[0].device)
        return dataclasses.replace(self, trial=trial, sums=(zeros,) * len(trial))

    def seen(self, pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor]) -> Absorption:
        """After a call.

        Args:
            pairs: per layer, attention to sink and new tokens, and to everything, [B, S, dim] each.
            weights: per layer, the output projection [dim, out].
        """
        statistics = tuple(s.added(*pair) for s, pair in zip(self.statistics, pairs, strict=True))
        if not self.trial:
            return dataclasses.replace(self, statistics=statistics)
        sums = tuple(
            total + _errors(found, *pair, weight)
            for total, found, pair, weight in zip(self.sums, self.trial, pairs, weights, strict=True)
        )
        return dataclasses.replace(self, statistics=statistics, sums=sums)

    def leaving(self, chunk: int) -> Absorption:
        """After the calls of a chunk: the warm-up's end chooses layers and fits their maps on all of it."""
        if chunk != self.settings.warmup - 1:
            return self
        scores = [((s[0] / s[1]).mean().item(), (s[0] / s[2]).mean().item()) for s in self.sums]
        maps = self._solved()
        fit = [i for i, (left, _) in enumerate(scores) if left < self.settings.most and bool(maps[i].isfinite().all())]
        chosen = set(sorted(fit, key=lambda i: scores[i][1])[: self.settings.most_layers(len(scores))])
        verdicts = tuple(Verdict(left, part, i in chosen) for i, (left, part) in enumerate(scores))
        installed = tuple(maps[i] if i in chosen else old for i, old in enumerate(self.maps))
        return dataclasses.replace(self, maps=installed, statistics=(), trial=(), sums=(), verdicts=verdicts)

    def standing_for(self, history: Callable[[int], tuple[Tensor, Tensor]]) -> Absorption:
        """With keys and values that stand for the history of converted layers, where the settings ask for them.

        Args:
            history: keys, rotated, and values of a layer [B, L, heads, head_dim] without its sink.
        """
        count = self.settings.tokens
        if not count:
            return self
        few = tuple(compressed(*history(i), count) if i in self.converted else old for i, old in enumerate(self.few))
        return dataclasses.replace(self, few=few)

    @property
    def inputs(self) -> list[Tensor] | list[dict[str, Tensor]]:
        """What the graph takes: maps, or keys and values that stand for histories."""
        return [found.inputs() for found in self.few] if self.settings.tokens else list(self.maps)

    @property
    def converted(self) -> tuple[int, ...]:
        """Layers that forget their history."""
        return tuple(i for i, verdict in enumerate(self.verdicts) if verdict.converted)

    @property
    def nbytes(self) -> int:
        """Bytes of what stands for the histories of converted layers."""
        if self.settings.tokens:
            return sum(self.few[i].nbytes for i in self.converted)
        return sum(self.maps[i].numel() * self.maps[i].element_size() for i in self.converted)

    def _solved(self) -> tuple[Tensor, ...]:
        priors = self.priors or (None,) * len(self.statistics)
        settings = self.settings
        return tuple(
            solve(found, settings.alpha, settings.rank, prior)
            for found, prior in zip(self.statistics, priors, strict=True)
        )


def _errors(found: Tensor, local: Tensor, full: Tensor, weight: Tensor) -> Tensor:
    """float64 [3, B]: squares of what a map leaves, of what is lacking without it, and of the whole, all projected."""
    a, want, projection = local.float(), full.float(), weight.float()
    rows = a.unflatten(2, (found.shape[1], found.shape[2])).transpose(1, 2)
    made = a + (rows @ found).transpose(1, 2).flatten(2)
    parts = ((made - want) @ projection, (a - want) @ projection, want @ projection)
    return torch.stack([part.double().square().flatten(1).sum(1) for part in parts])


class Watch:
    """A graph that shows attention to sink and new tokens, called as one that does not; what it shows is taken in."""

    def __init__(
        self, module: Callable[..., Sequence[object]], absorption: Absorption, weights: Sequence[Tensor]
    ) -> None:
        self.module, self.absorption, self.weights = module, absorption, weights

    def __call__(self, *args: object) -> tuple[object, ...]:
        """The results without the last, the pairs of each layer."""
        *results, pairs = self.module(*args)
        assert isinstance(pairs, list)
        self.absorption = self.absorption.seen(pairs, self.weights)
        return tuple(results)
