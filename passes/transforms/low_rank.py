"""Rewrite: the largest directions of a weight are kept in model dtype beside it (SVDQuant, arXiv 2411.05007)."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fxq.core.config import RecipeError
from fxq.core.ir import QuantGraph, Stage, put_tensor
from fxq.core.pipeline import Rewrite
from fxq.core.products import LOW_RANK
from fxq.passes.methods.units import unit_of
from fxq.passes.transforms.sites import (
    Layer,
    call,
    groups_of,
    mark,
    outliers_of,
    replace_weight,
    shape_of,
    stored,
    wide,
)
from fxq.runtime.memory.residency import Residency

_ATEN = torch.ops.aten
_MORE = 8  # directions followed beside those that are wanted
_ROUNDS = 8


def largest_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``down`` [K, r], orthonormal, and ``up`` [r, N] of the nearest matrix of rank r: ``(down up)^T``.

    By subspace iteration from a fixed random start (Halko, Martinsson and Tropp, arXiv 0909.4061): the cost is that of
    a few products with ``rank`` columns, not of a singular value decomposition.

    Args:
        weight: float [N, K], of any unit.
        rank: 1..min(N, K).
    """
    size = unit_of(weight)
    matrix = weight.float() / size
    count = min(rank + _MORE, *matrix.shape)
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(matrix.shape[1], count, generator=generator, dtype=torch.float32, device="cpu")
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    up = (basis @ left[:, :rank] * values[:rank]).T * size
    return right[:rank].T.contiguous(), up.contiguous()


@dataclasses.dataclass(frozen=True)
class LowRank(Rewrite):
    """A weight W of a quantized layer becomes R, and ``x V U`` is added to its output: ``W = R + (V U)^T``.

    V and U are the ``rank`` largest directions of W, in model dtype and never quantized; what is left has a smaller
    range. A layer whose branch would have as many numbers as its weight is left as it is. Outlier channels are detected
    again on R. Needs no data. Behind :class:`~fxq.passes.transforms.smooth.Smooth`, as in the paper, W is the smoothed
    weight.

    Registers ``<layer>.low_rank_down`` [K, r] and ``<layer>.low_rank_up`` [r, N]. Costs two products of ``rows x (K +
    N) x r`` and an addition, and ``r (K + N)`` numbers of memory, which the layer's bytes of a summary have in them.

    Source: SVDQuant (arXiv 2411.05007), without its fused kernels.
    """

    rank: int = 16
    needs: ClassVar[Stage] = Stage.CALIBRATED
    gives: ClassVar[Stage] = Stage.CALIBRATED
    learns: ClassVar[bool] = False
    stores: ClassVar[tuple[str, ...]] = LOW_RANK

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"LowRank: rank = {self.rank}, expected at least 1")

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers that got a branch."""
        workers, residency, count = graph.workers, Residency(), 0
        groups = [group for group in groups_of(graph.module) if any(map(self._fits, group))]
        owners = graph.owners([layer.plan for layer in group] for group in groups)
        for group, owner in zip(groups, owners, strict=True):
            mine = owner == workers.rank
            found = workers.share(self._split(graph, group) if mine else None, owner)
            for i, layer in enumerate(group):
                outliers = tuple(found[f"{i}.outliers"].tolist())
                if self._fits(layer):
                    weight, (down, up) = layer.weight(graph.module), (found[f"{i}.{name}"] for name in LOW_RANK)
                    _rewrite(graph, layer, down.to(weight.device), up.to(weight.device))
                    residency.give_back(weight)
                    mark(layer, self.name, outliers)
                    count += 1
                else:
                    mark(layer, "", outliers)
        return count

    def _fits(self, layer: Layer) -> bool:
        inputs, outputs = layer.plan.in_features, layer.plan.out_features
        return self.rank * (inputs + outputs) < inputs * outputs

    def _split(self, graph: QuantGraph, group: Sequence[Layer]) -> dict[str, Tensor]:
        """``<i>.low_rank_down``, ``<i>.low_rank_up`` in the input's dtype and ``<i>.outliers`` of each layer."""
        found: dict[str, Tensor] = {}
        rests = []
        for i, layer in enumerate(group):
            weight = layer.weight(graph.module)
            if self._fits(layer):
                factors = [t.to(layer.dtype) for t in largest_directions(weight, self.rank)]
                found |= {f"{i}.{name}": t.cpu() for name, t in zip(LOW_RANK, factors, strict=True)}
                weight = rest(weight, *factors)
            rests.append(weight)
        for i, channels in enumerate(outliers_of(rests, [layer.plan for layer in group])):
            found[f"{i}.outliers"] = torch.tensor(channels, dtype=torch.int64, device="cpu")
        return found


def rest(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What is left of a weight [N, K] beside the branch as it is stored, in the weight's dtype."""
    exact = wide(weight)
    return (exact - (down.to(exact) @ up.to(exact)).T).to(weight.dtype)


def _rewrite(graph: QuantGraph, layer: Layer, down: Tensor, up: Tensor) -> None:
    module, names = graph.module, [f"{layer.name}.{name}" for name in LOW_RANK]
    replace_weight(module, layer, rest(layer.weight(module), down, up))
    for name, tensor in zip(names, (down, up), strict=True):
        put_tensor(module, name, tensor)
    for site, x in zip(layer.sites, layer.inputs, strict=True):
        linear, shape = site.node, shape_of(site.node)
        inner = call(linear, _ATEN.matmul.default, (x, stored(linear, names[0], down)), (*shape[:-1], down.shape[1]))
        branch = call(linear, _ATEN.matmul.default, (inner, stored(linear, names[1], up)), shape)
        whole = call(linear, _ATEN.add.Tensor, (branch, linear), shape)
        linear.append(whole)
        linear.replace_all_uses_with(whole, delete_user_cb=functools.partial(operator.is_not, whole))
