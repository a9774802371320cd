"""How far a metric of a table can be trusted to rank it (the measures of arXiv 2605.21072).

``CV`` says whether a metric tells rows apart at all, ``BOA`` whether it puts widths into the order that they must have,
``DS = CV BOA`` both at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reliability:
    """Of one metric; NaN where it cannot be said.

    ``cv`` and ``boa`` are as :func:`variation` and :func:`order_agreement`, ``between_seeds`` the mean over rows of the
    coefficient of variation over calibration seeds: a difference between rows of that size is no difference.
    """

    metric: str
    cv: float
    boa: float
    between_seeds: float

    @property
    def ds(self) -> float:
        """``cv boa``."""
        return self.cv * self.boa


def variation(values: Sequence[float], *, sample: bool = False) -> float:
    """Coefficient of variation, deviation over mean; of a ``sample`` with n - 1. NaN for no values or a mean of 0."""
    found = np.array(values, np.float64)
    if len(found) <= sample or not found.mean():
        return math.nan
    return float(found.std(ddof=int(sample)) / abs(found.mean()))


def bits_of(width: str) -> tuple[int, int] | None:
    """Bits of weights and inputs of a label such as w4a8; None for one that says more, or mixed ones."""
    found = re.fullmatch(r"w(\d+)a(\d+)", width.lower())
    return (int(found[1]), int(found[2])) if found else None


def order_agreement(values: Mapping[str, Mapping[str, float]], full: float, *, lower: bool) -> float:
    """Share of methods whose widths a metric orders as it must: full precision > W8A8 > W4A8 > W4A6.

    Args:
        values: per method, the metric by width. Widths are ordered by bits of weights, then of inputs; methods with
            fewer than two do not count.
        full: the metric of full precision.
        lower: whether lower values are better.

    Returns:
        The share, each comparison strict; NaN without a method that counts.
    """
    agree = []
    for by_width in values.values():
        known = [(bits, value) for width, value in by_width.items() if (bits := bits_of(width)) is not None]
        if len(known) < 2:
            continue
        ordered = [full, *(value for _, value in sorted(known, reverse=True, key=lambda pair: pair[0]))]
        signed = ordered if lower else [-value for value in ordered]
        agree.append(all(a < b for a, b in itertools.pairwise(signed)))
    return float(np.mean(agree)) if agree else math.nan
