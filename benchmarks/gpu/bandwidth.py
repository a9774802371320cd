"""The operators between linears, in bytes per second: inputs rotate through more memory than the L2 cache holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.graphs import copies
from benchmarks.gpu.problems import Sizes
from benchmarks.gpu.session import Entry, Session
from fxq.bench.contest import Built
from fxq.kernels import Op, norm_quantize, norm_quantize_per_token, quantize_act, rms_norm_rope
from fxq.models.causal_wan import rope_tables

EAGER = "the same in eager torch"
Run = Callable[[Tensor], Tensor]


def _rotating(run: Run, inputs: Sequence[Tensor]) -> Callable[[], Built]:
    """One call runs all copies; outputs are kept, so that they cannot stay in the cache either."""

    def make() -> Built:
        return Built(lambda: [run(x) for x in inputs], output=lambda: run(inputs[0]).float())

    return make


def _integers(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Without the scales that an operator measures."""
    return result[0] if isinstance(result, tuple) else result


def _contest(session: Session, step: str, op: Op, x: Tensor, rest: tuple[Any, ...], size: int) -> dict[str, Any]:
    """``size`` bytes are read and written at least for one input."""
    inputs = copies(x)

    def ours(x: Tensor) -> Tensor:
        return _integers(op(x, *rest))

    def eager(x: Tensor) -> Tensor:
        return _integers(op.reference(x, *rest))

    entries = [
        Entry(EAGER, _rotating(eager, inputs), "bfloat16", cold=False),
        Entry(f"fxq::{op.name}", _rotating(ours, inputs), uses=(op.name,), cold=False),
    ]
    work = {"bytes": float(size * len(inputs))}
    return session.contest(step, lambda: eager(x).float(), entries, (EAGER,), work=work)


def run_bandwidth(session: Session, sizes: Sizes) -> None:
    """quantize_act and norm_quantize, with static scales and with scales per token, and rms_norm_rope."""
    dim, heads, device = sizes.config.dim, sizes.config.num_heads, session.device
    tokens = sizes.grid[0] * sizes.grid[1]
    scale = torch.tensor([0.03, 0.2], device=device)
    zero = torch.tensor([3, -4], dtype=torch.int32, device=device)

    def permutation(width: int, gather: bool) -> Tensor | None:
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(width, generator=generator).to(device, torch.int32) if gather else None

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    def norm(rows: int, gather: bool) -> Callable[[str], dict[str, Any]]:
        def work(step: str) -> dict[str, Any]:
            frames = normal(1, max(1, rows // tokens), dim)
            rest = (None, None, frames, frames, 1e-6, permutation(dim, gather), scale, zero, dim - 32, 8)
            return _contest(session, step, norm_quantize, normal(1, rows, dim), rest, 3 * rows * dim)

        return work

    def norm_per_token(rows: int, gather: bool) -> Callable[[str], dict[str, Any]]:
        def work(step: str) -> dict[str, Any]:
            frames = normal(1, max(1, rows // tokens), dim)
            rest = (None, None, frames, frames, 1e-6, permutation(dim, gather), dim - 32, 8)
            return _contest(session, step, norm_quantize_per_token, normal(1, rows, dim), rest, 3 * rows * dim)

        return work

    def quantize(rows: int, width: int, gather: bool) -> Callable[[str], dict[str, Any]]:
        def work(step: str) -> dict[str, Any]:
            rest = (permutation(width, gather), scale, zero, width - 32, 8)
            return _contest(session, step, quantize_act, normal(1, rows, width), rest, 3 * rows * width)

        return work

    def rope(rows: int) -> Callable[[str], dict[str, Any]]:
        def work(step: str) -> dict[str, Any]:
            cos, sin = (t.to(device) for t in rope_tables(dim // heads, rows // tokens, *sizes.grid))
            rest = (normal(dim), 1e-6, cos, sin, heads)
            return _contest(session, step, rms_norm_rope, normal(1, rows, dim), rest, 4 * rows * dim + 2 * cos.nbytes)

        return work

    for rows in sizes.rows:
        for gather in (False, True):
            suffix = ", gather" if gather else ""
            session.step("bandwidth", f"norm_quantize M{rows} K{dim}{suffix}", norm(rows, gather))
            name = f"scales per token behind a norm M{rows} K{dim}{suffix}"
            session.step("bandwidth", name, norm_per_token(rows, gather))
            for width in (dim, sizes.config.ffn_dim):
                session.step("bandwidth", f"quantize_act M{rows} K{width}{suffix}", quantize(rows, width, gather))
        session.step("bandwidth", f"rms_norm_rope M{rows} K{dim}", rope(rows))
