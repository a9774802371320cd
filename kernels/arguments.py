"""What the operators take: one class each, from whose fields the schema, the checks and every kernel derive.

An operator is called with the fields in their order; a field that is such a class itself stands for its own fields.
N is the number of output channels, K of input channels. G is the number of channel groups: 2, ``[normal | outlier]``,
when ``split`` is less than the channels, else 1. A scale is the value of one integer step, of the quantity named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Quantization(NamedTuple):
    """Static quantization of K channels.

    Attributes:
        perm: int32 [K], ``x[..., perm]`` is quantized; None keeps the order.
        scale: float32 [G], positive (Q-ARVD, arXiv 2605.21072).
        zero_point: int32 [G], less than 2**21 in absolute value.
        split: number of normal channels, 1..K.
        bits: 2..8.
    """

    perm: Tensor | None
    scale: Tensor
    zero_point: Tensor
    split: int
    bits: int


class QuantizeAct(NamedTuple):
    """Arguments of :func:`fxq.kernels.quantize.op.quantize_act`.

    Attributes:
        x: float32, bfloat16 or float16 [..., K].
        quantization: of its channels.
    """

    x: Tensor
    quantization: Quantization


class QuantizePerToken(NamedTuple):
    """Arguments of :func:`fxq.kernels.gemm.per_token.quantize_per_token` and of ``quantize_per_token_asymmetric``.

    Attributes:
        x: float32, bfloat16 or float16 [..., K].
        perm: int32 [K], ``x[..., perm]`` is quantized; None keeps the order.
        split: number of normal channels, 1..K.
        bits: 2..8.
    """

    x: Tensor
    perm: Tensor | None
    split: int
    bits: int


class NormQuantize(NamedTuple):
    """Arguments of :func:`fxq.kernels.norm.op.norm_quantize`.

    Attributes:
        x: float32, bfloat16 or float16 [B, S, K], normalised over K.
        weight: float [K] or None for 1, the norm's own scale.
        bias: float [K] or None for 0.
        gain: float [B, F, K] or None for 0, the modulation's scale; row s of S takes frame ``s // (S / F)``.
        shift: float [B, F, K], None with ``gain``.
        eps: of the norm, positive.
        quantization: of the result.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    eps: float
    quantization: Quantization


class ActivationQuantizePerToken(NamedTuple):
    """Arguments of :func:`fxq.kernels.gemm.activated.activation_quantize_per_token` and of its asymmetric twin.

    Attributes:
        x: as in :class:`QuantizePerToken`.
        activation: name in :data:`fxq.kernels.gemm.activations.ACTIVATIONS`, computed in float32.
        perm: as in :class:`QuantizePerToken`, of the activation's result, as all that follows.
        split: as there.
        bits: as there.
    """

    x: Tensor
    activation: str
    perm: Tensor | None
    split: int
    bits: int


class NormQuantizePerToken(NamedTuple):
    """Arguments of :func:`fxq.kernels.norm.per_token.norm_quantize_per_token` and of its asymmetric twin.

    Attributes:
        x: as in :class:`NormQuantize`, up to ``eps``.
        weight: as there.
        bias: as there.
        gain: as there.
        shift: as there.
        eps: as there.
        perm: as in :class:`QuantizePerToken`, of the norm's result.
        split: as there.
        bits: as there.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    eps: float
    perm: Tensor | None
    split: int
    bits: int


class RmsNormRope(NamedTuple):
    """Arguments of :func:`fxq.kernels.rope.op.rms_norm_rope`.

    Attributes:
        x: float32, bfloat16 or float16 [B, S, heads * head_dim].
        weight: float [heads * head_dim], the norm's scale, or None for no norm.
        eps: of the norm.
        cos: float32 [S, head_dim / 2], or None for no rotation.
        sin: as ``cos``.
        heads: number of heads.
    """

    x: Tensor
    weight: Tensor | None
    eps: float
    cos: Tensor | None
    sin: Tensor | None
    heads: int


class Attention(NamedTuple):
    """Arguments of :func:`fxq.kernels.attention.op.attention`.

    Attributes:
        q: float32, bfloat16 or float16 [B, S, heads, head_dim].
        k: pieces [B, L_i, heads, head_dim] of q's dtype; a piece may be empty.
        v: as ``k``.
    """

    q: Tensor
    k: Sequence[Tensor]
    v: Sequence[Tensor]


class AttentionPacked(NamedTuple):
    """Arguments of :func:`fxq.kernels.attention.encoded.packed.attention_packed`.

    Attributes:
        q: as in :class:`Attention`.
        k: exact pieces, rotated, as in :class:`Attention`.
        v: as ``k``.
        packed_k: what the codec of keys stores of whole spans, in its order; without one the keys themselves, rotated,
            [B, tokens, heads, head_dim]. Those of no token stand for a layer without encoded tokens, whatever ``cos``.
        packed_v: as ``packed_k``, for values.
        cos: float32 [tokens, head_dim / 2] of the encoded tokens; where these are no whole spans, the first tokens of
            the first span are evicted.
        sin: as ``cos``.
        codec: settings as JSON, ``{"keys": ..., "values": ...}``, null for what is not encoded.
        span: tokens of a span.
    """

    q: Tensor
    k: Sequence[Tensor]
    v: Sequence[Tensor]
    packed_k: Sequence[Tensor]
    packed_v: Sequence[Tensor]
    cos: Tensor
    sin: Tensor
    codec: str
    span: int


class AttentionWeighted(NamedTuple):
    """Arguments of :func:`fxq.kernels.attention.weighted.attention_weighted`.

    Attributes:
        q: as in :class:`Attention`.
        k: as there.
        v: as there.
        few_k: of q's dtype [B, T, heads, head_dim]; T may be 0.
        few_v: as ``few_k``.
        weight: float32 [B, T, heads], how many keys each of ``few_k`` stands for; 0: none.
    """

    q: Tensor
    k: Sequence[Tensor]
    v: Sequence[Tensor]
    few_k: Tensor
    few_v: Tensor
    weight: Tensor


class AbsorbMap(NamedTuple):
    """Arguments of :func:`fxq.kernels.attention.absorb.absorb`.

    Attributes:
        x: float32, bfloat16 or float16 [B, S, groups * width].
        map: float32 [B, groups, width, width].
    """

    x: Tensor
    map: Tensor


class Operands(NamedTuple):
    """What every linear multiplies.

    Attributes:
        q: int8 [..., K] in ``[normal | outlier]`` order.
        weight: int8 [N, K] when bits is 5..8, uint8 [N, K / 2] of :func:`fxq.numerics.pack_int4` when it is 2..4, or
            panels of :func:`fxq.kernels.gemm.panels.pack_panels` of the same dtypes.
        weight_scale: float32 [G, N], positive.
        input_scale: float32 [G], positive.
        offset: float32 [N] of :func:`fxq.numerics.fold_offset`, in units of the result.
        split: number of normal channels, 1..K; a multiple of 32, as K, when the weight is uint8 [N, K / 2].
        bits: width of the weights.
    """

    q: Tensor
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    offset: Tensor
    split: int
    bits: int

    @property
    def width(self) -> int:
        """Input channels K."""
        return self.q.shape[-1]

    @property
    def outputs(self) -> int:
        """Output channels N."""
        return self.offset.shape[0]

    @property
    def packed(self) -> bool:
        """Whether a byte of the weight holds two channels."""
        return self.weight.dtype == torch.uint8

    @property
    def asymmetric(self) -> bool:
        """Whether zero points lie behind the input scales of the rows."""
        return self.input_scale.shape[-1] > self.weight_scale.shape[0]

    def empty(self, dtype: torch.dtype) -> Tensor:
        """An unfilled result, [..., N]."""
        return self.q.new_empty((*self.q.shape[:-1], self.outputs), dtype=dtype)


class DualScaleLinear(NamedTuple):
    """Arguments of :func:`fxq.kernels.gemm.op.dual_scale_linear`.

    Attributes:
        operands: of the product.
        dtype: of the result: float32, bfloat16 or float16.
    """

    operands: Operands
    dtype: torch.dtype


class DualScaleLinearQuantize(NamedTuple):
    """Arguments of :func:`fxq.kernels.gemm.epilogues.dual_scale_linear_quantize`.

    Attributes:
        operands: of the product; the rows of the weight are in the next layer's ``[normal | outlier]`` channel order.
        activation: name in :data:`fxq.kernels.gemm.activations.ACTIVATIONS`, computed in float32.
        out_scale: float32 [G], positive; G of the N outputs.
        out_zero_point: int32 [G].
        out_split: normal channels among the N outputs.
        out_bits: 2..8, width of the result's integers.
    """

    operands: Operands
    activation: str
    out_scale: Tensor
    out_zero_point: Tensor
    out_split: int
    out_bits: int

    @property
    def quantization(self) -> Quantization:
        """Of the result."""
        return Quantization(None, self.out_scale, self.out_zero_point, self.out_split, self.out_bits)


class DualScaleLinearAdd(NamedTuple):
    """Arguments of :func:`fxq.kernels.gemm.epilogues.dual_scale_linear_add` and of ``dual_scale_linear_per_token_add``.

    Attributes:
        operands: of the product, q [B, S, K]; scales per token are [B, S, G or 2 G], as in
            :class:`DualScaleLinearPerToken`.
        residual: float32, bfloat16 or float16 [B, S, N].
        gate: float [B, F, N] or None for 1; row s of S takes frame ``s // (S / F)``.
    """

    operands: Operands
    residual: Tensor
    gate: Tensor | None


class DualScaleLinearPerToken(NamedTuple):
    """Arguments of :func:`fxq.kernels.gemm.per_token.dual_scale_linear_per_token`.

    Attributes:
        q: int8 [..., K] in ``[normal | outlier]`` order.
        input_scale: float32 [..., G], positive, of :func:`fxq.kernels.gemm.per_token.quantize_per_token`; or [..., 2 G]
            of ``quantize_per_token_asymmetric``, with the zero points behind the scales.
        weight: as in :class:`Operands`.
        weight_scale: float32 [G, N], positive.
        offset: float32 [N], the bias.
        split: as in :class:`Operands`.
        bits: width of the weights.
        dtype: of the result: float32, bfloat16 or float16.
    """

    q: Tensor
    input_scale: Tensor
    weight: Tensor
    weight_scale: Tensor
    offset: Tensor
    split: int
    bits: int
    dtype: torch.dtype

    @property
    def operands(self) -> Operands:
        """Of the product, with the input scales [..., G or 2 G]."""
        return Operands(self.q, self.weight, self.weight_scale, self.input_scale, self.offset, self.split, self.bits)
