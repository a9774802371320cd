"""Inputs of every operator with one number that is not finite, and how its result shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels import (
    OPS,
    Op,
    activation_quantize_per_token,
    activation_quantize_per_token_asymmetric,
    attention,
    attention_int8,
    attention_int8_fp8,
    native,
    norm_quantize_per_token,
    norm_quantize_per_token_asymmetric,
    quantize_fp8_per_token,
    quantize_per_token,
    quantize_per_token_asymmetric,
)

BAD = (float("nan"), float("inf"), -float("inf"))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATED = (activation_quantize_per_token, activation_quantize_per_token_asymmetric)
NORMS = (norm_quantize_per_token, norm_quantize_per_token_asymmetric)
MEASURING = (quantize_per_token, quantize_per_token_asymmetric, quantize_fp8_per_token, *NORMS, *ACTIVATED)
READ_BY_ROWS = (
    "quantize_act",
    "norm_quantize",
    "quantize_fp8",
    "rms_norm_rope",
    "attention",
    "attention_int8",
    "attention_int8_fp8",
)
ATTENTIONS = (attention, attention_int8, attention_int8_fp8)
MULTIPLY = ("dual_scale_linear", "dual_scale_linear_quantize", "dual_scale_linear_add")

Implementation = Callable[..., Any]


def implementations(op: Op) -> dict[str, Implementation]:
    """Name -> what can run an operator here, kernels on a CPU and the reference."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)

    def eager(*arguments: Any) -> Any:
        ready, native.ready = native.ready, lambda: False
        try:
            return op(*arguments)
        finally:
            native.ready = ready

    found = {"reference": lambda *arguments: op.definition.redispatch(keys, *arguments), "eager": eager}
    return found | ({"native": op} if native.ready() else {})


def by_rows(x: Tensor) -> Tensor:
    """A view of what an operator reads or gives as rows."""
    return x.reshape(-1, x.shape[-1])


def shows(op: Op, result: Any, rows: int) -> Tensor:
    """bool [rows]: whether a result shows that the row is not finite."""
    if op in MEASURING:
        return ~by_rows(result[1]).isfinite().all(1)
    result = result.float() if result.dtype == torch.float8_e4m3fn else result
    flat = result.reshape(rows, -1)
    return numerics.poisoned(flat) if result.dtype == torch.int8 else ~flat.isfinite().all(1)


def broken_inputs(op: Op) -> Iterator[tuple[str, tuple[Any, ...], tuple[Any, ...], Tensor]]:
    """(name, sound arguments, broken ones, bool [rows] that must show it) of every sample and each of BAD."""
    for number, sample in enumerate(op.samples()):
        rows = sample[0].numel() // max(1, sample[0].shape[-1])
        if op in ATTENTIONS:
            rows = sample[0].shape[0] * sample[0].shape[1]
        if not rows or (sample[0].shape[-1] < numerics.POISON_LEAST and op not in ATTENTIONS):
            continue
        for i, value in enumerate(BAD):
            x = sample[0].clone()
            row = (7 * number + 3 * i + 1) % rows
            expected = torch.zeros(rows, dtype=torch.bool)
            expected[row] = True
            if x.dtype in FLOATS:
                x.reshape(rows, -1)[row, (11 * number + 5 * i + 3) % (x.numel() // rows)] = value
            elif x.dtype == torch.float8_e4m3fn:
                x.reshape(rows, -1).view(torch.uint8)[row, 5] = 0x7F
            else:
                codes = numerics.poison_codes(x.shape[-1])
                by_rows(x)[row, : len(codes)] = codes
            yield f"{op.name}-{number}-{value}", sample, (x, *sample[1:]), expected


def every_case() -> Iterator[tuple[str, Op, tuple[Any, ...], tuple[Any, ...], Tensor]]:
    """(name, operator, sound arguments, broken ones, rows) of the operators that show it by their first argument."""
    for op in OPS:
        if op in MEASURING or op.name in (*READ_BY_ROWS, *MULTIPLY, "dual_scale_linear_fp8"):
            for name, sound, broken, rows in broken_inputs(op):
                yield name, op, sound, broken, rows
