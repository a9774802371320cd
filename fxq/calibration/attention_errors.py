"""What attention in 8 bits would change, measured on the calls of calibration."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxq.core.graph import arguments
from fxq.kernels import Op, attention_int8
from fxq.runtime.workers import Workers

ROWS = 256
"""Queries of a call that are compared, at most; they are evenly spread."""

_SDPA = torch.ops.aten.scaled_dot_product_attention.default


class AttentionErrors:
    """Squared errors of attention in 8 bits beside the squares of exact attention, by node of the graph.

    Args:
        op: that takes the place of exact attention.
    """

    def __init__(self, op: Op = attention_int8) -> None:
        self.op = op
        self._sums: dict[str, Tensor] = {}

    def add(self, node: fx.Node, query: Tensor, key: Tensor, value: Tensor, result: Tensor) -> None:
        """Compare one call; what the operator does not take is left out.

        Args:
            node: of the attention.
            query: [B, heads, S, head_dim].
            key: [B, heads, L, head_dim].
            value: as ``key``.
            result: exact, as ``query``.
        """
        if result.ndim != 4 or not result.numel():
            return
        step = -(-query.shape[2] // ROWS)
        q, k, v = (x.detach().transpose(1, 2) for x in (query[:, :, ::step], key, value))
        if self.op.supports(q, [k], [v]):
            return
        want = result.detach()[:, :, ::step].transpose(1, 2).flatten(2).double()
        with torch.no_grad():
            got = self.op(q, [k], [v]).double()
        sums = torch.stack([(got - want).square().sum(), want.square().sum()]).cpu()
        self._sums[node.name] = self._sums.get(node.name, torch.zeros_like(sums)) + sums

    def merge(self, workers: Workers) -> None:
        """Make these the sums over the calls of all ranks.

        Raises:
            fxq.runtime.workers.WorkerError: when a rank is gone.
        """
        merged: dict[str, Tensor] = {}
        for sums in workers.gather(self._sums):
            for name, pair in sums.items():
                merged[name] = merged.get(name, torch.zeros_like(pair)) + pair
        self._sums = merged

    def found(self) -> dict[str, float]:
        """Relative error, root mean square, by the name of the node."""
        ratios = {name: float(noise / signal) if signal > 0 else 0.0 for name, (noise, signal) in self._sums.items()}
        return {name: ratio**0.5 for name, ratio in ratios.items()}


def see(errors: AttentionErrors | None, node: fx.Node, env: dict[fx.Node, object], result: object) -> None:
    """Show a node's call to ``errors``, where it is an attention without a mask; ``env`` has the nodes' values."""
    if errors is None or node.target != _SDPA or not isinstance(result, Tensor):
        return
    named = arguments(node)
    if named["attn_mask"] is None and not named["is_causal"]:
        query, key, value = (env[named[name]] for name in ("query", "key", "value"))
        assert isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
        errors.add(node, query, key, value, result)
