"""Multiple-choice knapsack: one option of each group, such that costs are least and weights within a limit."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Options = Sequence[tuple[float, float]]
"""Weight and cost of each option of a group, neither negative."""

_MOST_STATES = 20_000
_SLACK = 1e-12  # relative rounding of sums that are compared


class KnapsackError(ValueError):
    """No choice is within the limit."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An option of each group by its number, the sums of their weights and costs, and a bound on what is missed.

    ``gap`` is how much less the cost of another choice could be, at most; 0 where the choice is proved to be best.
    """

    options: tuple[int, ...]
    weight: float
    cost: float
    gap: float

    @classmethod
    def of(cls, groups: Sequence[Options], options: Sequence[int], gap: float = 0.0) -> Choice:
        """The choice with its sums, in the order of the groups."""
        chosen = [group[i] for group, i in zip(groups, options, strict=True)]
        return cls(tuple(options), math.fsum(w for w, _ in chosen), math.fsum(c for _, c in chosen), gap)


def choose(groups: Sequence[Options], limit: float, most_states: int = _MOST_STATES) -> Choice:
    """The choice of least cost whose weight is at most ``limit``; of equal ones that of less weight.

    Dynamic programming over the groups: of partial choices those stay that no other beats in weight and cost, and that
    could still become better than the best known choice. What a partial choice costs at least follows from the linear
    relaxation of the groups that are left, which takes steps on their convex hulls in the order of slopes (Sinha and
    Zoltners 1979); its own steps that fit are the first choice known. Where more than ``most_states`` partial choices
    are left, those of the least bounds go on, and the bounds of the others say how large the gap can be.

    Args:
        groups: their options.
        limit: of the sum of weights.
        most_states: partial choices in memory.

    Raises:
        KnapsackError: when even the lightest options weigh more, telling what they weigh.
    """
    least = math.fsum(min(w for w, _ in group) for group in groups)
    if least > limit:
        raise KnapsackError(f"the least possible is {least:.12g}, the limit {limit:.12g}")
    best = _greedy(groups, limit)
    order = sorted(range(len(groups)), key=lambda i: -_spread(groups[i]))  # what matters most is decided first
    relaxed = _relaxations([groups[i] for i in order])
    weights, costs = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    dropped, upper = math.inf, best.cost
    for step, i in enumerate(order):
        own = np.array(groups[i], dtype=np.float64)
        parents = np.repeat(np.arange(len(weights)), len(own))
        picks = np.tile(np.arange(len(own)), len(weights))
        weights, costs = weights[parents] + own[picks, 0], costs[parents] + own[picks, 1]
        bounds = costs + _relaxed_cost(relaxed[step + 1], limit * (1 + _SLACK) - weights)
        keep = np.flatnonzero(bounds <= upper * (1 + _SLACK))
        keep = keep[_efficient(weights[keep], costs[keep])]
        if len(keep) > most_states:
            ranked = keep[np.argsort(bounds[keep], kind="stable")]
            dropped = min(dropped, float(bounds[ranked[most_states]]))
            keep = np.sort(ranked[:most_states])
        weights, costs = weights[keep], costs[keep]
        trail.append((parents[keep], picks[keep]))
    for end in np.lexsort((weights, costs)):
        found = Choice.of(groups, _options(trail, order, int(end)))
        if found.weight <= limit:
            best = min(best, found, key=lambda choice: (choice.cost, choice.weight))
            break
    return dataclasses.replace(best, gap=max(0.0, best.cost - dropped))


def hull(groups: Sequence[Options]) -> list[Choice]:
    """Choices from the lightest to the one of least cost, each of least cost at its weight.

    Those on the lower convex hull of all choices' sums: there are others between them, and none below.
    """
    current = [_lightest(group) for group in groups]
    found = [Choice.of(groups, current)]
    for _, i, option in _steps(groups):
        current[i] = option
        found.append(Choice.of(groups, current))
    return found


def _spread(group: Options) -> float:
    costs = [cost for _, cost in group]
    return max(costs) - min(costs)


def _lightest(group: Options) -> int:
    return min(range(len(group)), key=lambda i: group[i])


def _group_hull(group: Options) -> list[int]:
    """Options on the lower convex hull, from the lightest to the one of least cost."""
    kept: list[int] = []
    for i in sorted(range(len(group)), key=lambda i: group[i]):
        if kept and group[i][1] >= group[kept[-1]][1]:
            continue
        while len(kept) > 1 and _slope(group, kept[-2], kept[-1]) >= _slope(group, kept[-1], i):
            kept.pop()
        kept.append(i)
    return kept


def _slope(group: Options, a: int, b: int) -> float:
    """Cost per weight from one option to a heavier and cheaper one: negative."""
    return (group[b][1] - group[a][1]) / (group[b][0] - group[a][0])


def _steps(groups: Sequence[Options]) -> list[tuple[float, int, int]]:
    """(slope, group, option that is reached), steepest first."""
    found = []
    for i, group in enumerate(groups):
        kept = _group_hull(group)
        found += [(_slope(group, a, b), i, b) for a, b in itertools.pairwise(kept)]
    return sorted(found, key=lambda step: step[0])  # stable: those of a group of equal slopes stay in order


def _greedy(groups: Sequence[Options], limit: float) -> Choice:
    """The steps of the hulls that fit, and where the same option of all groups is better, that one."""
    current, closed = [_lightest(group) for group in groups], set[int]()
    for _, i, option in _steps(groups):
        before = current[i]
        current[i] = option
        if i in closed or Choice.of(groups, current).weight > limit:
            current[i] = before
            closed.add(i)
    known = [Choice.of(groups, current)]
    for number in range(min(map(len, groups), default=0)):
        known.append(Choice.of(groups, [number] * len(groups)))
    return min((c for c in known if c.weight <= limit), key=lambda choice: (choice.cost, choice.weight))


def _relaxations(groups: Sequence[Options]) -> list[tuple[Floats, Floats]]:
    """For the groups from each number on: weights and least costs at the corners of their linear relaxation."""
    steps, result = _steps(groups), []
    for first in range(len(groups) + 1):
        weight = sum(groups[i][_lightest(groups[i])][0] for i in range(first, len(groups)))
        cost = sum(groups[i][_lightest(groups[i])][1] for i in range(first, len(groups)))
        moves = [(0.0, 0.0)]
        at = [_lightest(group) for group in groups]
        for _, i, option in steps:
            if i >= first:
                (w0, c0), (w1, c1) = groups[i][at[i]], groups[i][option]
                moves.append((w1 - w0, c1 - c0))
                at[i] = option
        sums = np.cumsum(np.array(moves), axis=0)
        result.append((weight + sums[:, 0], cost + sums[:, 1]))
    return result


def _relaxed_cost(corners: tuple[Floats, Floats], room: Floats) -> Floats:
    """Least cost of what is left in the room that is left; infinite where nothing fits."""
    weights, costs = corners
    slack = _SLACK * max(1.0, float(weights[-1]))
    found: Floats = np.where(room < weights[0] - slack, np.inf, np.interp(room, weights, costs))
    return found


def _efficient(weights: Floats, costs: Floats) -> NDArray[np.int64]:
    """States that no other one beats or equals, ascending by weight."""
    order = np.lexsort((costs, weights))
    least = np.minimum.accumulate(np.concatenate(([np.inf], costs[order])))[:-1]
    kept: NDArray[np.int64] = order[costs[order] < least]
    return kept


def _options(trail: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], order: Sequence[int], end: int) -> list[int]:
    """The options that led to a state of the last step, by group."""
    found = [0] * len(order)
    for (parents, picks), i in zip(reversed(trail), reversed(order), strict=True):
        found[i], end = int(picks[end]), int(parents[end])
    return found
