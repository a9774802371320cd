"""What tensors without data do not tell: which dtypes a kernel takes, and what it costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from fxq import kernels
from fxq.runtime.messages import first_line

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "dot", "addmv", "addbmm", "convolution", "linear"})
"""Operators whose tensors have one dtype."""
_FLOATS = frozenset(
    {"convolution", "_softmax", "_log_softmax", "native_layer_norm", "native_group_norm", "native_batch_norm"}
    | {"linalg_qr", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "grid_sampler_2d"}
)
"""Operators whose first tensor is floating point."""
_NORMS = frozenset({"native_layer_norm", "native_group_norm", "native_batch_norm"})

_AXES = frozenset(
    {"_softmax", "_log_softmax", "softmax", "log_softmax", "sort", "argsort"}
    | {"select_scatter", "slice_scatter", "diagonal_scatter"}
)
"""Operators that take any axis of a tensor without data."""
_ATTENTIONS = frozenset({"attention_packed", "attention_weighted", *(op.name for op in kernels.ATTENTIONS.values())})
_PARTS = {
    "slice_scatter": torch.ops.aten.slice.Tensor,
    "select_scatter": torch.ops.aten.select.int,
    "diagonal_scatter": torch.ops.aten.diagonal.default,
}
"""What makes the part of a tensor that an operator puts its source into."""


def tensors_in(value: object) -> list[Tensor]:
    """Tensors of an argument list or result, in lists too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def misfit(func: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """Why a kernel would refuse the dtypes or axes of a call whose shapes fit, or ""."""
    kind, read = str(func).split(".")[1], tensors_in(args)
    if not read:
        return ""
    if kind in _AXES and (reason := _axis_out_of_range(func, args, kwargs, read[0])):
        return reason
    if kind in _PARTS and (reason := _source_of_another_size(func, args, kwargs, _PARTS[kind])):
        return reason
    dtypes = [tensor.dtype for tensor in read]
    first = dtypes[0]
    if kind in _FLOATS and not (first.is_floating_point or first.is_complex):
        return f"{func} takes floating point numbers, not {first}"
    same = kind in _PRODUCTS or "scaled_dot_product" in kind
    if same and any(dtype != first for dtype in dtypes if dtype != torch.bool):
        return f"{func} takes tensors of one dtype, not {', '.join(map(str, dtypes))}"
    wide = (torch.float32,) if first in (torch.bfloat16, torch.float16) else ()
    if kind in _NORMS and any(dtype not in (first, *wide) for dtype in dtypes):
        return f"{func} takes parameters of the dtype of its input, not {', '.join(map(str, dtypes))}"
    if torch.Tag.pointwise in func.tags and not kind.endswith("_") and read[0].device.type == "cpu":
        return _probe(func, tuple(dtypes), tuple(map(_form, args)), tuple((k, _form(v)) for k, v in kwargs.items()))
    return ""


def _axis_out_of_range(func: Any, args: Sequence[object], kwargs: Mapping[str, object], first: Tensor) -> str:
    names = [argument.name for argument in func._schema.arguments]
    given, rank = dict(zip(names, args, strict=False)) | dict(kwargs), max(1, first.ndim)
    axes = {name: given[name] for name in ("dim", "dim1", "dim2") if isinstance(given.get(name), int)}
    for name, axis in axes.items():
        if not -rank <= axis < rank:
            return f"{func}: {name} = {axis}, expected an axis of {first.ndim}"
    index = given.get("index")
    if "dim" in axes and isinstance(index, int):
        size = first.shape[axes["dim"]] if first.ndim else 1
        if isinstance(size, int) and not -size <= index < size:
            return f"{func}: index = {index}, expected one of {size}"
    return ""


def _source_of_another_size(func: Any, args: Sequence[object], kwargs: Mapping[str, object], part_of: Any) -> str:
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    into, source = given.pop("self"), given.pop("src")
    if not isinstance(into, Tensor) or not isinstance(source, Tensor):
        return ""
    part = part_of(into, **given)
    known = all(isinstance(size, int) for size in (*part.shape, *source.shape))
    if part.ndim != source.ndim or (known and part.shape != source.shape):
        return f"{func}: a source of size {list(source.shape)}, expected {list(part.shape)}"
    return ""


_TENSOR = object()


def _form(value: object) -> object:
    """An argument as a part of a key: tensors are all alike, and numbers count by their type."""
    if isinstance(value, Tensor):
        return _TENSOR
    if isinstance(value, list | tuple):
        return tuple(map(_form, value))
    if isinstance(value, bool | str | torch.dtype) or value is None:
        return value
    return type(value)(1) if isinstance(value, int | float) else None


@functools.lru_cache(maxsize=4096)
def _probe(func: Any, dtypes: tuple[torch.dtype, ...], args: Any, kwargs: Any) -> str:
    """Call an elementwise operator on one element of each dtype: the kernel itself says what it does not take."""
    with _python_dispatch._disable_current_modes():
        left = iter(dtypes)

        def real(value: object) -> object:
            if value is _TENSOR:
                return torch.ones(1, dtype=next(left))
            return [real(item) for item in value] if isinstance(value, tuple) else value

        try:
            func(*(real(value) for value in args), **{key: real(value) for key, value in kwargs if key != "device"})
        except Exception as error:
            return f"{func} does not take {', '.join(map(str, dtypes))}: {first_line(error, 200)}"
    return ""


def work_of(name: str, read: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    """About how many multiplications an operator makes; elements that are read and written count as eight."""
    passes = 8 * sum(math.prod(t.shape) for t in (*read, *made))
    if not made or not read:
        return passes
    kind, out = name.split(".")[1], math.prod(made[0].shape)
    if kind in ("mm", "bmm", "linear", "matmul", "mv", "dot") or kind.startswith("dual_scale_linear"):
        return passes + out * (read[0].shape[-1] if read[0].ndim else 1)
    if kind in ("addmm", "baddbmm", "addbmm", "addmv") and len(read) > 1:
        return passes + out * read[1].shape[-1]
    if "convolution" in kind and len(read) > 1:
        wide = max(out, math.prod(read[0].shape))
        return passes + wide * math.prod(read[1].shape[1:])
    if "scaled_dot_product" in kind and len(read) > 1 and read[1].ndim > 1:
        return passes + 2 * math.prod(read[0].shape) * read[1].shape[-2]
    if kind == "absorb" and len(read) > 1:
        return passes + out * read[1].shape[-1]
    if kind in _ATTENTIONS:
        tokens = [t.shape[1] if t.ndim > 2 else t.shape[0] for t in read[1:] if t.ndim > 1]
        return passes + 2 * math.prod(read[0].shape) * sum(tokens)
    if kind.startswith(("linalg_", "chain")) and read[0].ndim > 1:
        return passes + math.prod(read[0].shape) * min(read[0].shape[-2:]) * 4
    return passes
