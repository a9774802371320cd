"""C++ kernels for x86 and AArch64 CPUs, compiled at first use and called through ctypes.

Which instruction sets there are kernels for, and which of them this CPU gets, says :mod:`fxq.kernels.native.build`.

The functions here take tensors that the operators have checked, and write into ``out``. Tensors are read with the
strides they have as long as the last dimension is contiguous.

Nothing here checks arguments or falls back: operators do.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxq.kernels.arguments import (
    ActivationQuantizePerToken,
    Attention,
    DualScaleLinearAdd,
    DualScaleLinearQuantize,
    NormQuantize,
    NormQuantizePerToken,
    Operands,
    QuantizeAct,
    QuantizePerToken,
    RmsNormRope,
)
from fxq.kernels.native.build import instruction_set, library, why_slower
from fxq.kernels.native.coded import Coded

__all__ = [
    "activation_code",
    "attends",
    "attention",
    "attention_int8",
    "attention_lse",
    "library_name",
    "linear",
    "linear_add",
    "linear_per_token",
    "linear_quantize",
    "name",
    "or_else",
    "quantize_act",
    "quantize_per_token",
    "ready",
    "rms_norm_rope",
    "why_not",
    "why_slower",
]

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int32, ctypes.c_float
_STORES = {torch.float32: 0, torch.bfloat16: 1}
_QUANTIZE, _ADD = 2, {torch.float32: 3, torch.bfloat16: 4}


def ready() -> bool:
    """Whether the native kernels can be called; the first call compiles them."""
    return library()[0] is not None


def why_not() -> str:
    """Why they cannot, or ""."""
    return library()[1]


@functools.cache
def activation_code(name: str) -> int:
    """What the library calls an activation of ``linear_quantize`` by, less than 0 where it has none of that name."""
    loaded = library()[0]
    return -1 if loaded is None else int(loaded.fxq_activation(name.encode()))


def name() -> str:
    """How reports call the native kernels of this CPU: the ``kernel`` of one of :data:`.build.SETS`."""
    library()  # which may find that the fastest cannot be used
    found = instruction_set()
    return "native" if found is None else found.kernel


def library_name() -> str:
    """Name of the library in use, which stands for its sources, compiler and flags; "" without one."""
    loaded = library()[0]
    return "" if loaded is None else os.path.basename(loaded._name)


def attends(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether attention in a dtype is among the native kernels of this CPU."""
    if not ready():
        return False
    found = instruction_set()
    return found is not None and str(dtype).removeprefix("torch.") in found.attention


def or_else(other: str, there: Callable[[], bool] | None = None) -> Callable[[], str]:
    """Says :func:`name` where the native kernels can be called, or ``there`` says so, and ``other`` where not."""
    return lambda: name() if (there or ready)() else other


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    kinds = {"p": _POINTER, "l": _LONG, "i": _INT, "f": _FLOAT}
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kinds[kind]) for field, kind in pairs]})


# The fields of the C++ structures of the same names, in their order.
_Linear = _struct(
    "Linear",
    "q:p panels:p weight_scale:p input_scale:p offset:p out:p rows:l outputs:l width:l split:l q_stride:l store:i"
    " threads:i out_scale:p out_zero_point:p out_split:l out_bits:i activation:i residual:p gate:p residual_stride:l"
    " gate_rows:l gate_is_bfloat16:i per_token:i asymmetric:i packed:i",
)
_Quantization = _struct("Quantization", "perm:p scale:p zero_point:p width:l split:l bits:i")
_Tokens = _struct("Tokens", "scale:p least:f asymmetric:i activation:i")
_Rows = _struct("Rows", "x:p out:p rows:l width:l x_stride:l is_bfloat16:i threads:i")
_Norm = _struct("Norm", "weight:p bias:p gain:p shift:p gain_rows:l eps:f")
_Rotary = _struct("Rotary", "weight:p cos:p sin:p sequence:l heads:l size:l eps:f")
_Piece = _struct(
    "Piece",
    "k:p v:p length:l k_batch:l k_row:l k_head:l v_batch:l v_row:l v_head:l"
    " k_scale:p v_scale:p scale_batch:l block_batch:l skip:l",
)
_Attention = _struct(
    "Attention",
    "q:p out:p part:p lse:p pieces:p means:p piece_count:l batch:l rows:l heads:l size:l q_batch:l q_row:l q_head:l"
    " is_bfloat16:i threads:i span:p",
)


_untold_forks: list[int] = []
"""This process, where it is a fork and the library does not know it yet."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _untold_forks.append(os.getpid()))


def _call(function: str, *structures: ctypes.Structure | None) -> None:
    loaded = library()[0]
    assert loaded is not None
    if _untold_forks:
        loaded.fxq_after_fork()
        _untold_forks.clear()
    if getattr(loaded, function)(*(None if s is None else ctypes.byref(s) for s in structures)):
        raise ValueError("perm has entries outside of a row: expected every channel of x once")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """[M, K] with contiguous rows, a view where it can be one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _run_linear(operands: Operands, out: Tensor, store: int, **epilogue: float | None) -> Tensor:
    q = _rows(operands.q)
    constants = [t.contiguous() for t in (operands.weight_scale, operands.input_scale, operands.offset)]
    panels = operands.weight.contiguous()
    call = _Linear(
        q=q.data_ptr(),
        panels=panels.data_ptr(),
        weight_scale=constants[0].data_ptr(),
        input_scale=constants[1].data_ptr(),
        offset=constants[2].data_ptr(),
        out=out.data_ptr(),
        rows=q.shape[0],
        outputs=operands.outputs,
        width=operands.width,
        split=operands.split,
        q_stride=q.stride(0),
        store=store,
        threads=torch.get_num_threads(),
        packed=operands.packed,
        **({"out_split": operands.outputs, "out_bits": 8} | epilogue),
    )
    _call("fxq_linear", call)
    return out


def linear(operands: Operands, out: Tensor) -> Tensor:
    """``out`` float32 or bfloat16 [..., N] of panels; see :func:`fxq.kernels.gemm.op.dual_scale_linear`."""
    return _run_linear(operands, out, _STORES[out.dtype])


def linear_per_token(operands: Operands, out: Tensor) -> Tensor:
    """As :func:`linear` with input scales [..., G or 2 G]; see :mod:`fxq.kernels.gemm.per_token`."""
    return _run_linear(operands, out, _STORES[out.dtype], per_token=True, asymmetric=operands.asymmetric)


def linear_quantize(a: DualScaleLinearQuantize, out: Tensor) -> Tensor:
    """``out`` int8 [..., N] of panels, where :func:`activation_code` is not negative.

    See :func:`fxq.kernels.gemm.epilogues.dual_scale_linear_quantize`.
    """
    scale, zero_point = a.out_scale.contiguous(), a.out_zero_point.contiguous()
    return _run_linear(
        a.operands,
        out,
        _QUANTIZE,
        out_scale=scale.data_ptr(),
        out_zero_point=zero_point.data_ptr(),
        out_split=a.out_split,
        out_bits=a.out_bits,
        activation=activation_code(a.activation),
    )


def linear_add(a: DualScaleLinearAdd, out: Tensor) -> Tensor:
    """``out`` [B, S, N] in the residual's dtype; see :func:`fxq.kernels.gemm.epilogues.dual_scale_linear_add`."""
    residual, gate = a.residual, a.gate
    rest = _rows(residual)
    gates = None if gate is None else (gate.float() if gate.dtype == torch.float16 else gate).contiguous()
    tokens = 1 if gates is None else residual.shape[1] // gates.shape[1]
    return _run_linear(
        a.operands,
        out,
        _ADD[residual.dtype],
        residual=rest.data_ptr(),
        residual_stride=rest.stride(0),
        gate=_address(gates),
        gate_rows=max(1, tokens),
        gate_is_bfloat16=gates is not None and gates.dtype == torch.bfloat16,
        per_token=a.operands.input_scale.ndim > 1,
        asymmetric=a.operands.asymmetric,
    )


def _rows_call(rows: Tensor, out: Tensor) -> ctypes.Structure:
    is_bfloat16 = rows.dtype == torch.bfloat16
    return _Rows(rows.data_ptr(), out.data_ptr(), *rows.shape, rows.stride(0), is_bfloat16, torch.get_num_threads())


def quantize_act(a: QuantizeAct | NormQuantize, out: Tensor) -> Tensor:
    """``out`` int8 [..., K] of x, after its norm where there is one; see :mod:`fxq.kernels.quantize.op`."""
    (norm, _held), (_, _, _, split, bits) = _norm(a), a.quantization
    constants = [None if t is None else t.contiguous() for t in a.quantization[:3]]
    rows = _rows(a.x)
    quantization = _Quantization(*map(_address, constants), rows.shape[1], split, bits)
    _call("fxq_quantize_rows", _rows_call(rows, out), norm, quantization)
    return out


def quantize_per_token(
    a: QuantizePerToken | NormQuantizePerToken | ActivationQuantizePerToken, least: float, out: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_act`, and ``scale`` [..., G or 2 G], with zero points where it has room for them."""
    norm, _held = _norm(a)
    asymmetric = scale.shape[-1] > (2 if a.split < a.x.shape[-1] else 1)
    rows, perm = _rows(a.x), None if a.perm is None else a.perm.contiguous()
    quantization = _Quantization(_address(perm), None, None, rows.shape[1], a.split, a.bits)
    activation = activation_code(a.activation) if isinstance(a, ActivationQuantizePerToken) else 0
    tokens = _Tokens(scale.data_ptr(), least, asymmetric, activation)
    _call("fxq_quantize_tokens", _rows_call(rows, out), norm, quantization, tokens)
    return out, scale


def _norm(a: object) -> tuple[ctypes.Structure | None, list[Tensor | None]]:
    """The norm before a quantization, if there is one, and the tensors it points to."""
    if not isinstance(a, NormQuantize | NormQuantizePerToken):
        return None, []
    affine = [None if t is None else t.float().contiguous() for t in (a.weight, a.bias)]
    frames = [None if t is None else t.to(a.x.dtype).contiguous() for t in (a.gain, a.shift)]
    tokens = 1 if a.gain is None else a.x.shape[1] // a.gain.shape[1]
    return _Norm(*map(_address, affine + frames), max(1, tokens), a.eps), affine + frames


def rms_norm_rope(a: RmsNormRope, out: Tensor) -> Tensor:
    """``out`` [B, S, heads, head_dim] of float32 or bfloat16 x; see :func:`fxq.kernels.rope.op.rms_norm_rope`."""
    rows = _rows(a.x)
    kept = [None if t is None else t.float().contiguous() for t in (a.weight, a.cos, a.sin)]
    rotary = _Rotary(*(_address(t) for t in kept), max(1, a.x.shape[1]), a.heads, a.x.shape[2] // a.heads, a.eps)
    _call("fxq_rotate_rows", _rows_call(rows, out), rotary)
    return out


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def attention(a: Attention, out: Tensor) -> Tensor:
    """``out`` [B, S, heads * head_dim] where :func:`attends`; see :func:`fxq.kernels.attention.op.attention`."""
    _attend("fxq_attention", a, out=out.data_ptr())
    return out


def attention_lse(a: Attention) -> tuple[Tensor, Tensor]:
    """Of pieces with one key at least; see :func:`fxq.kernels.attention.merge.attention_lse`."""
    part = torch.empty(a.q.shape, dtype=torch.float32)
    lse = torch.empty((*a.q.shape[:3], 1), dtype=torch.float32)
    _attend("fxq_attention", a, part=part.data_ptr(), lse=lse.data_ptr())
    return part, lse


def attention_int8(a: Attention, means: Tensor, out: Tensor, coded: Sequence[Coded] = ()) -> Tensor:
    """``out`` float32 or bfloat16 [B, S, heads * head_dim]; as ``fxq::attention_int8`` says.

    Args:
        a: queries, and pieces of keys and values.
        means: float32 [pieces, B, heads, head_dim], contiguous, of the keys, coded ones behind the others.
        out: of q's dtype.
        coded: pieces whose integers there are.
    """
    _attend("fxq_attention_int8", a, coded, out=out.data_ptr(), means=means.data_ptr())
    return out


def _attend(function: str, a: Attention, coded: Sequence[Coded] = (), **pointers: int) -> None:
    q = _unit_stride(a.q)
    keys, values = [_unit_stride(t) for t in a.k], [_unit_stride(t) for t in a.v]
    pieces = [
        _Piece(one.data_ptr(), two.data_ptr(), one.shape[1], *one.stride()[:3], *two.stride()[:3])
        for one, two in zip(keys, values, strict=True)
    ]
    held = [each.rows_as_they_lie() for each in coded]
    pieces += [
        _Piece(
            *(c.k.data_ptr(), c.v.data_ptr(), c.k.shape[1], *c.k.stride()[:3], *c.v.stride()[:3]),
            *(c.k_scale.data_ptr(), c.v_scale.data_ptr(), c.k_scale.stride(0), c.v_scale.stride(0), c.skip),
        )
        for c in held
    ]
    array = (_Piece * len(pieces))(*pieces)
    batch, rows, heads, size = q.shape
    q_batch, q_row, q_head, _ = q.stride()
    call = _Attention(
        q=q.data_ptr(),
        pieces=ctypes.addressof(array),
        piece_count=len(pieces),
        batch=batch,
        rows=rows,
        heads=heads,
        size=size,
        q_batch=q_batch,
        q_row=q_row,
        q_head=q_head,
        is_bfloat16=q.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        **pointers,
    )
    _call(function, call)
