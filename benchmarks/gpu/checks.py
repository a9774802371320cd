"""Every kernel against its reference on the device: on the operators' own samples and on layers of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.gpu.problems import Layer, Sizes, wan_layers
from benchmarks.gpu.session import Session
from fxq.cache.codecs import PRESETS, Int8Attention, Klt, Prq
from fxq.cache.codecs.codec import Codec, Kind
from fxq.cache.named import codecs_text
from fxq.kernels import OPS, Op, quantize_act, rms_norm_rope
from fxq.kernels.arguments import Operands
from fxq.kernels.gemm import gluon as gluon_gemm
from fxq.kernels.gemm import tiles
from fxq.kernels.gemm import triton as gemm_triton
from fxq.kernels.gemm.fp8 import dual_scale_linear_fp8, quantize_fp8
from fxq.kernels.gemm.gluon import GluonTiles
from fxq.kernels.gemm.op import dual_scale_linear
from fxq.kernels.gemm.tiles import Tiles
from fxq.models.causal_wan import rope_tables

RARE = 0.005
"""Share of integers that may differ by one, where a float lies on a rounding boundary."""

SWEPT = (*tiles.TABLE, replace(tiles.TABLE[1], warps=4))
"""Every tile of the table, and the one of two programs per multiprocessor of Hopper."""


Linear = Callable[[Operands, torch.dtype], Tensor]


def tiles_name(kind: str, size: Tiles | GluonTiles) -> str:
    """As "Triton 128x128x128 w8 s3"."""
    return f"{kind} {size.block_m}x{size.block_n}x{size.block_k} w{size.warps} s{size.stages}"


def triton_linear(size: Tiles, operands: Operands, dtype: torch.dtype) -> Tensor:
    """dual_scale_linear by given tiles; the operator itself on a CPU."""
    if not operands.q.is_cuda:
        return dual_scale_linear(*operands, dtype)
    out = operands.empty(dtype)
    with torch.cuda.device(operands.q.device):
        return gemm_triton.launch(operands, out, tiles=size)


def gluon_linear(size: GluonTiles, operands: Operands, dtype: torch.dtype) -> Tensor:
    """As :func:`triton_linear`, by the Gluon kernel."""
    if not operands.q.is_cuda:
        return dual_scale_linear(*operands, dtype)
    return gluon_gemm.launch_gluon(operands, dtype, size)


def swept() -> dict[str, Linear]:
    """The linear by every tile that is measured, by the name of its check."""
    gluon = {tiles_name("Gluon", size): partial(gluon_linear, size) for size in gluon_gemm.TABLE}
    return {**gluon, **{tiles_name("Triton", size): partial(triton_linear, size) for size in SWEPT}}


def disagreement(got: Tensor, want: Tensor, max_error: float) -> str:
    """How a kernel's result leaves the bound of its operator, or ""."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"is {got.dtype} {tuple(got.shape)}, the reference {want.dtype} {tuple(want.shape)}"
    if not want.numel():
        return ""
    if want.dtype == torch.int8:
        error = (got.int() - want.int()).abs()
        worst, share = int(error.max()), float((error > 0).float().mean())
        right = worst <= (1 if max_error else 0) and share < RARE
        return "" if right else f"integers differ by up to {worst}, {share:.2%} of them"
    error, largest = (got.float() - want.float()).abs().max(), float(want.float().abs().max())
    relative = float(error) / max(largest, 1e-30)
    return "" if relative <= max_error else f"differs by {relative:.2g} of the largest value, allowed {max_error:.2g}"


def _is_panels(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.ndim == 4 and argument.dtype == torch.int8


def _op_arguments(op: Op, sizes: Sizes, device: str) -> Iterator[Sequence[Any]]:
    """Arguments of an operator at the sizes of the model."""
    rows, dim, heads = sizes.rows[0], sizes.config.dim, sizes.config.num_heads
    layer = wan_layers(sizes, device, rows)[0]
    q = layer.integers()
    x = layer.x.unsqueeze(0)
    scale, zero = q.input_scale, torch.tensor([3, -4], dtype=torch.int32, device=device)
    perm = torch.randperm(dim, generator=torch.Generator().manual_seed(0)).to(device, torch.int32)
    frames = torch.randn(1, 3, dim, device=device).bfloat16()
    batched = q._replace(q=q.q.unsqueeze(0))
    cos, sin = (t.to(device) for t in rope_tables(dim // heads, rows // (sizes.grid[0] * sizes.grid[1]), *sizes.grid))
    floats, rows_scale = layer.floats(), _token_scales(rows, len(q.weight_scale), device)[0]
    head = x.unflatten(-1, (heads, -1))
    few = head[:, :16], head[:, 16:32]
    residual, gate = (torch.randn(1, each, q.outputs, device=device).bfloat16() for each in (rows, 3))
    added = [(residual, None), (residual, gate)]
    normed: list[Sequence[Any]] = [(x, None, None, frames, frames, 1e-6, p, q.split, 8) for p in (None, perm)]
    activated: list[Sequence[Any]] = [(x, "gelu_tanh", order, q.split, 8) for order in (None, perm)]
    found: dict[str, list[Sequence[Any]]] = {
        "quantize_act": [(x, order, scale, zero, q.split, 8) for order in (None, perm)],
        "norm_quantize": [(x, None, None, frames, frames, 1e-6, p, scale, zero, q.split, 8) for p in (None, perm)],
        "activation_quantize_per_token": activated,
        "activation_quantize_per_token_asymmetric": activated,
        "norm_quantize_per_token": normed,
        "norm_quantize_per_token_asymmetric": normed,
        "dual_scale_linear": [(*each, torch.bfloat16) for each in (q, layer.integers(False), layer.integers(bits=4))],
        "dual_scale_linear_quantize": [(*batched, "gelu_tanh", scale, zero, sizes.config.ffn_dim - 32, 8)],
        "dual_scale_linear_add": [(*batched, *rest) for rest in added],
        "dual_scale_linear_per_token_add": [
            (*batched._replace(input_scale=scales.unsqueeze(0)), *rest)
            for scales in _token_scales(rows, len(q.weight_scale), device)
            for rest in added
        ],
        "rms_norm_rope": [(x, torch.ones(dim, device=device).bfloat16(), 1e-6, cos, sin, heads)],
        "attention": [(head, [head, head], [head, head])],
        "attention_int8": [(head, [head, head], [head, head])],
        "attention_int8_fp8": [(head, [head, head], [head, head])],
        "attention_packed": [
            *(_packed(head, codec, cos, sin) for codec in (PRESETS["int8"], Prq(1, 16, block=16), Klt(1.0))),
            _packed(head, Int8Attention(), cos, sin, integers=True),
        ],
        "attention_weighted": [(head, [head, head], [head, head], *few, torch.rand(1, 16, heads, device=device) * 9)],
        "absorb": [(x, torch.randn(1, heads, dim // heads, dim // heads, device=device) / dim)],
        "quantize_fp8": [(x, order, scale, q.split) for order in (None, perm)],
        "dual_scale_linear_fp8": [(*layer.floats(), torch.bfloat16)],
        "quantize_fp8_per_token": [(x, order, q.split) for order in (None, perm)],
        "dual_scale_linear_fp8_per_token": [(floats[0], rows_scale, *floats[1:3], *floats[4:], torch.bfloat16)],
        "quantize_per_token": [(x, order, q.split, 8) for order in (None, perm)],
        "quantize_per_token_asymmetric": [(x, order, q.split, 8) for order in (None, perm)],
        "dual_scale_linear_per_token": [
            (o.q, scales, *o[1:3], *o[4:], torch.bfloat16)
            for o in (q, layer.integers(False), layer.integers(bits=4))
            for scales in _token_scales(rows, len(o.weight_scale), device)
        ],
    }
    yield from found[op.name]


def _token_scales(rows: int, groups: int, device: str) -> tuple[Tensor, Tensor]:
    """Scales of tokens, and the same with zero points behind them."""
    scales = torch.rand(rows, groups, device=device) / 20
    return scales, torch.cat((scales, torch.randint(-128, 128, scales.shape, device=device).float()), dim=1)


def _packed(head: Tensor, codec: Codec, cos: Tensor, sin: Tensor, integers: bool = False) -> Sequence[Any]:
    """Attention to one encoded span of the tokens and to the tokens themselves."""
    kinds: tuple[Kind, ...] = ("keys", "values")
    records = [codec.encode(head, kind, {})[0] for kind in kinds]
    stored = [[record.tensors[field.name] for field in record.fields] for record in records]
    return (head, [head], [head], *stored, cos, sin, codecs_text(codec, codec, integers), head.shape[1])


def check_op(op: Op, sizes: Sizes, device: str) -> dict[str, Any]:
    """``problem`` is "" when the operator agrees with its reference on all arguments."""
    kind, tried = torch.device(device).type, 0
    for sample in op.samples():
        if kind != "cpu" and any(_is_panels(argument) for argument in sample):
            continue
        got = op(*pytree.tree_map_only(Tensor, lambda t: t.to(device), sample))
        tried += 1
        if problem := _first_problem(pytree.tree_map(Tensor.cpu, got), op.reference(*sample), op.max_error):
            return {"problem": f"sample {tried}: {problem}", "kernel": op.used(kind)}
    for arguments in _op_arguments(op, sizes, device):
        tried += 1
        if problem := _first_problem(op(*arguments), op.reference(*arguments), op.max_error):
            return {"problem": f"at the model's sizes: {problem}", "kernel": op.used(kind)}
    return {"problem": "", "kernel": op.used(kind), "arguments": tried}


def _first_problem(got: Any, want: Any, max_error: float) -> str:
    """:func:`disagreement` of one tensor, or of the first of several that has one."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    return next(filter(None, (disagreement(a, b, max_error) for a, b in pairs)), "")


def check_tiles(run: Linear, sizes: Sizes, device: str) -> dict[str, Any]:
    """As :func:`check_op` for a kernel of the linear that no operator is bound to; sizes odd and of the model."""
    layers = [Layer.random(333, 512, 200, 96, device), *wan_layers(sizes, device, sizes.rows[0])]
    for layer in layers:
        operands = layer.integers()
        want = dual_scale_linear.reference(*operands, torch.bfloat16)
        if problem := disagreement(run(operands, torch.bfloat16), want, dual_scale_linear.max_error):
            return {"problem": f"{tuple(layer.x.shape)} x {tuple(layer.weight.shape)}: {problem}"}
    return {"problem": "", "arguments": len(layers)}


def run_checks(session: Session, sizes: Sizes) -> None:
    """One step per operator and per tile."""
    first = (quantize_act, dual_scale_linear, rms_norm_rope)
    rest = tuple(op for op in (*OPS, quantize_fp8, dual_scale_linear_fp8) if op not in first)
    for op in (*first, *rest):
        session.step("checks", op.name, partial(_op_step, op, sizes, session.device))
    for name, run in swept().items():
        session.step("checks", name, partial(_tiles_step, run, sizes, session.device))


def _op_step(op: Op, sizes: Sizes, device: str, step: str) -> dict[str, Any]:
    return check_op(op, sizes, device)


def _tiles_step(run: Linear, sizes: Sizes, device: str, step: str) -> dict[str, Any]:
    return check_tiles(run, sizes, device)
