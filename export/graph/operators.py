"""The operators a bundle may call, by overload: what captured and lowered models need, and nothing that has effects.

None of them reads or writes files, prints, draws random numbers, takes Python objects or changes a tensor's storage.
Those of :data:`IN_PLACE` write into their first argument. :mod:`fxq.export.graph.arguments` checks what they are given.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

import fxq.kernels as kernels

_ELEMENTWISE = """
abs absolute acos acosh add:Tensor,Scalar addcdiv addcmul angle arctan asin asinh atan atan2 atanh bitwise_not
bitwise_and:Tensor,Scalar bitwise_or:Tensor,Scalar bitwise_xor:Tensor,Scalar ceil celu
clamp:default,Tensor clamp_max:default,Tensor clamp_min:default,Tensor clip:default,Tensor complex conj conj_physical
copysign:Tensor,Scalar cos cosh deg2rad div:Tensor,Scalar,Tensor_mode,Scalar_mode divide:Tensor,Scalar elu
eq:Tensor,Scalar erf erfc erfinv exp exp2 expm1 fix float_power:Tensor_Tensor,Tensor_Scalar,Scalar floor
floor_divide:default,Scalar fmax fmin fmod:Tensor,Scalar frac ge:Tensor,Scalar gelu glu greater:Tensor,Scalar
greater_equal:Tensor,Scalar gt:Tensor,Scalar hardshrink hardsigmoid hardswish hardtanh hypot imag isclose isfinite
isinf isnan isneginf isposinf ldexp:Tensor le:Tensor,Scalar leaky_relu lerp:Scalar,Tensor less:Tensor,Scalar
less_equal:Tensor,Scalar lgamma log log10 log1p log2 log_sigmoid logaddexp logical_and logical_not logical_or
logical_xor logit lt:Tensor,Scalar masked_fill:Scalar,Tensor maximum minimum mish mul:Tensor,Scalar
multiply:Tensor,Scalar nan_to_num ne:Tensor,Scalar neg negative not_equal:Tensor,Scalar polar positive
pow:Tensor_Tensor,Tensor_Scalar,Scalar prelu rad2deg real reciprocal relu relu6 remainder:Tensor,Scalar,Scalar_Tensor
round:default,decimals rsqrt rsub:Tensor,Scalar selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink
special_erf special_expit special_sinc sqrt square sub:Tensor,Scalar subtract:Tensor,Scalar tan tanh threshold
true_divide:Tensor,Scalar trunc where:self,ScalarOther,ScalarSelf,Scalar,default xlogy:Tensor
__and__:Tensor,Scalar __or__:Tensor,Scalar __xor__:Tensor,Scalar
"""
_REDUCTIONS = """
all:default,dim,dims amax amin aminmax any:default,dim,dims argmax argmin argsort:default,stable count_nonzero:default
cosine_similarity cummax cummin cumprod cumsum linalg_norm linalg_vector_norm log_softmax:int logcumsumexp logsumexp
max:other,default,dim mean:default,dim median:default,dim min:other,default,dim
norm:Scalar,ScalarOpt_dim,ScalarOpt_dim_dtype prod:default,dim_int softmax:int sort:default,stable
std:default,dim,correction std_mean:default,dim,correction sum:default,dim_IntList topk var:default,dim,correction
var_mean:default,dim,correction
"""
_SHAPES = """
adjoint alias atleast_1d:default atleast_2d:default atleast_3d:default broadcast_tensors broadcast_to cat chunk clone
column_stack concat concatenate constant_pad_nd contiguous detach diag diag_embed diagonal diff dstack expand expand_as
flatten:using_ints flip gather hstack index:Tensor index_add index_copy index_fill:int_Tensor,int_Scalar index_put
index_select kron lift_fresh_copy mH mT masked_scatter meshgrid:default,indexing moveaxis:int,intlist
movedim:int,intlist narrow:default numpy_T one_hot pad pad_sequence permute pixel_shuffle pixel_unshuffle ravel
reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave:self_int,self_Tensor replication_pad1d
replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg roll rot90 row_stack
scatter:src,value,reduce,value_reduce scatter_add scatter_reduce:two select:int select_scatter slice:Tensor
slice_scatter split:Tensor,sizes,default split_with_sizes squeeze:default,dim,dims stack swapaxes swapdims t
copy diagonal_scatter fill:Scalar,Tensor zero:default _weight_norm gru:input lstm:input rnn_tanh:input rnn_relu:input
take_along_dim tensor_split:sections,indices tile to:device,dtype,other,dtype_layout _to_copy:default transpose:int
tril triu type_as unbind:int unflatten:int unfold unsafe_chunk unsafe_split:Tensor unsafe_split_with_sizes
_unsafe_view:default _reshape_alias:default unsqueeze view:default view_as view_as_complex view_as_real vstack
"""
_PRODUCTS = """
addbmm addmm addmv addr baddbmm bilinear bmm chain_matmul conv1d:default,padding conv2d:default,padding
conv3d:default,padding conv_transpose1d conv_transpose2d:input conv_transpose3d:input convolution cross dot einsum
embedding inner linalg_cross linalg_matmul linalg_qr linalg_vecdot linear matmul mm mv outer
scaled_dot_product_attention tensordot vdot
"""
_LAYERS = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d batch_norm channel_shuffle
dropout feature_dropout fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft
fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn grid_sampler grid_sampler_2d grid_sampler_3d group_norm instance_norm
layer_norm max_pool1d max_pool2d max_pool3d native_layer_norm rms_norm
upsample_bicubic2d:default,vec upsample_bilinear2d:default,vec upsample_linear1d:default,vec
upsample_nearest1d:default,vec upsample_nearest2d:default,vec upsample_nearest3d:default,vec
upsample_trilinear3d:default,vec
"""
_MADE = """
arange:default,start,start_step empty:memory_format empty_like eye:default,m full full_like
linspace:default new_empty new_full new_ones new_zeros ones ones_like scalar_tensor zeros zeros_like bucketize:Tensor
searchsorted:Tensor
"""
_IN_PLACE = """
add_:Tensor,Scalar addcmul_ clamp_ clamp_max_ clamp_min_ copy_ cos_ detach_ div_:Tensor,Scalar exp_ fill_:Scalar,Tensor
index_add_ index_copy_ index_fill_:int_Scalar,int_Tensor index_put_ masked_fill_:Scalar,Tensor mul_:Tensor,Scalar neg_
relu_ rsqrt_ scatter_:src,value sigmoid_ silu_ sin_ sqrt_ sub_:Tensor,Scalar tanh_ zero_
"""
_VALUES = """
item sym_size:int sym_numel:default sym_stride:int sym_storage_offset:default _assert_scalar
sym_constrain_range_for_size sym_constrain_range nonzero
"""
"""Sizes and single values in Python, what a capture asserts of them, and the one result whose size they decide."""

NAMESPACES = ("aten.", "fxq.", "prims.")
_KERNELS: tuple[kernels.Op, ...] = (
    kernels.quantize_act,
    kernels.dual_scale_linear,
    kernels.quantize_per_token,
    kernels.quantize_per_token_asymmetric,
    kernels.dual_scale_linear_per_token,
    *kernels.FLOAT8,
    kernels.attention_packed,
    kernels.absorb,
    kernels.attention_weighted,
    *kernels.ATTENTIONS.values(),
)


def _found(text: str) -> frozenset[str]:
    return frozenset(
        f"aten.{packet}.{overload}"
        for packet, _, overloads in (entry.partition(":") for entry in text.split())
        for overload in (overloads or "default").split(",")
    )


IN_PLACE = _found(_IN_PLACE)
"""Operators that write into their first argument."""
ATEN = _found(_ELEMENTWISE + _REDUCTIONS + _SHAPES + _PRODUCTS + _LAYERS + _MADE + _VALUES) | IN_PLACE
FXQ = frozenset(f"fxq.{op.name}.default" for op in _KERNELS)
ALLOWED = ATEN | FXQ
"""Every overload a graph may call, as ``aten.add.Tensor``."""

ARITHMETIC: dict[str, Callable[..., object]] = {
    f"operator.{f.__name__}": f
    for f in (
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
        operator.floordiv,
        operator.mod,
        operator.neg,
        operator.pos,
        operator.abs,
        operator.pow,
        operator.and_,
        operator.or_,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
    )
}
ARITHMETIC |= {
    f"torch.{f.__name__}": f
    for f in (torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite)
}
ARITHMETIC |= {f"torch.{name}": f for name in ("sym_sum", "_sym_sqrt") if (f := getattr(torch, name, None))}
ARITHMETIC |= {f"math.{f.__name__}": f for f in (math.ceil, math.floor, math.trunc)}
"""Python functions on sizes and single values by name; ``operator.getitem`` takes one result of several too."""
ARITHMETIC_NAMES = {f: name for name, f in ARITHMETIC.items()}


def find(name: str) -> object:
    """The function or overload of a name, or None where it is not allowed or torch does not have it."""
    if name in ARITHMETIC:
        return ARITHMETIC[name]
    if name not in ALLOWED:
        return None
    namespace, packet, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    return found if isinstance(found, OpOverload) else None


def exists(name: str) -> bool:
    """Whether torch has an overload of this name, allowed or not."""
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    schemas = torch._C._jit_get_schemas_for_operator(f"{namespace}::{packet}")
    return overload in {schema.overload_name or "default" for schema in schemas}


def name_of(target: Any) -> str | None:
    """The name of an allowed target, or None."""
    if isinstance(target, OpOverload):
        return str(target) if str(target) in ALLOWED else None
    try:
        return ARITHMETIC_NAMES.get(target)
    except TypeError:
        return None
