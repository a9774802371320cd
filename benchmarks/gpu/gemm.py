"""The integer linear against float ones: two scales, one scale, 4-bit weights, float8, and every tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.block import compiler
from benchmarks.gpu.checks import Linear, swept
from benchmarks.gpu.problems import Layer, Sizes
from benchmarks.gpu.session import Entry, Session
from fxq.kernels import dual_scale_linear, dual_scale_linear_add, dual_scale_linear_quantize, quantize_act
from fxq.kernels.arguments import Operands
from fxq.kernels.gemm.fp8 import FP8, LARGEST, dual_scale_linear_fp8

COMPILED = "bf16 compiled, autotuned"
CUBLAS, SINGLE, DUAL, W4 = "cuBLAS bf16", "fxq single scale", "fxq dual scale", "fxq dual scale, 4-bit weights"
SAMPLED = 64
ALONE = "linear alone, another result"
FRAMES = 3
BF16 = torch.bfloat16


def _rows(layer: Layer) -> Tensor:
    count = layer.x.shape[0]
    return torch.linspace(0, count - 1, min(SAMPLED, count)).long().to(layer.x.device)


def _ours(run: Linear, operands: Callable[[], Operands]) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        ready = operands()
        return lambda: run(ready, BF16)

    return make


def _scaled_mm(layer: Layer) -> Callable[[], Any]:
    """CuBLASLt float8 with one scale per tensor."""
    top, high = layer.x.float().abs().max(), layer.weight.float().abs().max()
    q, weight = ((t.float() * (LARGEST / m)).to(FP8) for t, m in ((layer.x, top), (layer.weight, high)))
    return lambda: torch._scaled_mm(q, weight.t(), top / LARGEST, high / LARGEST, bias=layer.bias, out_dtype=BF16)


def _int_mm(layer: Layer) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """CuBLASLt int8 to int32 without the dequantization that a layer needs, and that dequantization."""
    q = layer.integers(dual=False)
    scale = q.input_scale * q.weight_scale[0]
    return lambda: torch._int_mm(q.q, q.weight.t()), lambda sums: sums.float() * scale + q.offset


def _compiled(layer: Layer, dry: bool) -> Callable[[], Any]:
    """Inductor's choice between cuBLAS and its own tiles."""
    mode = None if dry else "max-autotune-no-cudagraphs"
    run = torch.compile(F.linear, backend=compiler(dry), mode=mode)
    return lambda: run(layer.x, layer.weight, layer.bias)


def gemm_entries(layer: Layer, compiled: Sequence[Entry] = ()) -> list[Entry]:
    """Every way to compute the layer; ``compiled`` is measured too, where there is time to compile it."""
    dual = ("dual_scale_linear",)
    plain, finish = _int_mm(layer)
    fp8 = layer.floats()

    def op(operands: Operands, dtype: torch.dtype) -> Tensor:
        return dual_scale_linear(*operands, dtype)

    entries = [
        Entry(CUBLAS, lambda: lambda: F.linear(layer.x, layer.weight, layer.bias), "bfloat16"),
        Entry(SINGLE, _ours(op, partial(layer.integers, False)), uses=dual),
        Entry(DUAL, _ours(op, layer.integers), uses=dual),
        Entry(W4, _ours(op, partial(layer.integers, bits=4)), "int4", uses=dual),
        *compiled,
        Entry("cuBLASLt int8 to int32 (_int_mm)", lambda: plain, finish=finish),
        Entry("cuBLASLt fp8, one scale (_scaled_mm)", lambda: _scaled_mm(layer), "float8"),
        Entry(
            "fxq dual scale fp8",
            lambda: lambda: dual_scale_linear_fp8(*fp8, BF16),
            "float8",
            uses=("dual_scale_linear_fp8",),
        ),
    ]
    for name, run in swept().items():
        entries.append(Entry(name, _ours(run, layer.integers), uses=(name,)))
    return entries


def run_gemm(session: Session, sizes: Sizes) -> None:
    """One step per shape, the FFN of a chunk first."""
    for rows in sizes.rows:
        for width, outputs in sizes.linears:

            def work(step: str, rows: int = rows, width: int = width, outputs: int = outputs) -> dict[str, Any]:
                layer = Layer.random(rows, width, outputs, sizes.outliers[width], session.device)
                picked = _rows(layer)
                in_ffn = sizes.config.ffn_dim in (width, outputs)
                autotuned = Entry(COMPILED, partial(_compiled, layer, session.dry), "bfloat16")
                return session.contest(
                    step,
                    lambda: layer.exact(picked),
                    gemm_entries(layer, [autotuned] if in_ffn and rows == sizes.rows[0] else []),
                    (CUBLAS, SINGLE, DUAL),
                    lambda y: y[picked],
                    {"flop": layer.flop},
                )

            session.step("gemm", f"M{rows} {width}>{outputs}", work)


def _gelu_entries(layer: Layer, target: Operands) -> list[Entry]:
    """GELU and the next layer's quantization after the first linear of an FFN."""
    q, zero = layer.integers(), torch.zeros_like(target.input_scale, dtype=torch.int32)
    scale, split = target.input_scale, target.split

    def separate() -> Tensor:
        y = F.gelu(dual_scale_linear(*q, BF16), approximate="tanh")
        return quantize_act(y, None, scale, zero, split, 8)

    def fused() -> Tensor:
        return dual_scale_linear_quantize(*q, "gelu_tanh", scale, zero, split, 8)

    uses = ("dual_scale_linear", "quantize_act")
    return [
        Entry("linear, GELU, quantize", lambda: separate, uses=uses),
        Entry("the same in one kernel", lambda: fused, uses=("dual_scale_linear_quantize",)),
        Entry(ALONE, lambda: lambda: dual_scale_linear(*q, BF16), bound=-1000.0, uses=uses[:1]),
    ]


def _add_entries(layer: Layer) -> list[Entry]:
    """Gate and residual after the second linear of an FFN."""
    q = layer.integers()
    q = q._replace(q=q.q.unsqueeze(0))
    residual = layer.x.new_empty(1, layer.x.shape[0], q.outputs).normal_()
    gate = residual.new_empty(1, FRAMES, q.outputs).normal_()

    def separate() -> Tensor:
        y = dual_scale_linear(*q, BF16).unflatten(1, (FRAMES, -1))
        return residual + (y * gate.unsqueeze(2)).flatten(1, 2)

    def fused() -> Tensor:
        return dual_scale_linear_add(*q, residual, gate)

    return [
        Entry("linear, gate, residual", lambda: separate, uses=("dual_scale_linear",)),
        Entry("the same in one kernel", lambda: fused, uses=("dual_scale_linear_add",)),
        Entry(ALONE, lambda: lambda: dual_scale_linear(*q, BF16), bound=-1000.0, uses=("dual_scale_linear",)),
    ]


def run_epilogues(session: Session, sizes: Sizes) -> None:
    """What fusing saves; compared with the separate operations' result."""
    rows, dim, hidden = sizes.rows[0], sizes.config.dim, sizes.config.ffn_dim

    def contest(step: str, entries: list[Entry], flop: float) -> dict[str, Any]:
        reference = entries[0].make()
        assert callable(reference)
        as_float = [replace(entry, finish=lambda y: y.float()) for entry in entries]
        opponents = (entries[0].name, entries[-1].name)
        return session.contest(step, lambda: reference().float(), as_float, opponents, work={"flop": flop})

    def gelu(step: str) -> dict[str, Any]:
        layer = Layer.random(rows, dim, hidden, sizes.outliers[dim], session.device)
        following = Layer.random(rows, hidden, dim, sizes.outliers[hidden], session.device).integers()
        return contest(step, _gelu_entries(layer, following), layer.flop)

    def add(step: str) -> dict[str, Any]:
        layer = Layer.random(rows, hidden, dim, sizes.outliers[hidden], session.device)
        return contest(step, _add_entries(layer), layer.flop)

    session.step("fused", f"M{rows} {dim}>{hidden} GELU and quantize", gelu)
    session.step("fused", f"M{rows} {hidden}>{dim} gate and residual", add)
