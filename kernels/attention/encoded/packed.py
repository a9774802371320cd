"""Unmasked attention to a cache whose old tokens are encoded: one span at a time is decoded, read and forgotten."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxq.kernels import native
from fxq.kernels.arguments import Attention, AttentionPacked
from fxq.kernels.attention import op
from fxq.kernels.attention import triton as packed_triton
from fxq.kernels.attention.codecs import LEADING_AXES, SpanCodec, channels, codecs_of
from fxq.kernels.attention.eight_bits.int8 import VALUE_BLOCK, Block, Piece, attended, key_mean, quantized
from fxq.kernels.attention.encoded import triton_stored
from fxq.kernels.attention.encoded.sides import Reader
from fxq.kernels.attention.merge import attention_lse, merge
from fxq.kernels.attention.spans import (
    Part,
    coefficients,
    count_spans,
    decoded,
    of_span,
    parts,
    rotated,
    tokens_held,
)
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.native import unpack
from fxq.kernels.native.coded import Coded
from fxq.kernels.op import declare

MOST_HEAD_DIM, MOST_SPAN = 1024, 2**30
"""Limits of what is decoded: channels of a head, tokens of a span."""


def _supports(a: AttentionPacked) -> str:
    if reason := op.supports(Attention(a.q, a.k, a.v)):
        return reason
    size = a.q.shape[3]
    if size > MOST_HEAD_DIM or size % 2 or not 1 <= a.span <= MOST_SPAN:
        return (
            f"heads of {size} channels and spans of {a.span} tokens: expected an even number up to {MOST_HEAD_DIM} and "
            f"1 to {MOST_SPAN}"
        )
    tokens = a.cos.shape[0]
    for name, table in (("cos", a.cos), ("sin", a.sin)):
        if table.dtype != torch.float32 or tuple(table.shape) != (tokens, size // 2):
            return f"{name} is {table.dtype} {tuple(table.shape)}: expected float32 [tokens, {size // 2}]"
    try:
        codecs = codecs_of(a.codec)
        if codecs == (None, None):
            return "neither keys nor values have a codec: use fxq::attention"
        held = [tokens_held(a, kind) for kind in ("keys", "values")]
        for name, codec, tensors, some in zip(("k", "v"), codecs, (a.packed_k, a.packed_v), held, strict=True):
            if reason := _misfit(codec, tensors, a, tokens if some else 0):
                return f"packed_{name}{reason}"
        if bool(held[0]) != bool(held[1]):
            return f"{held[0]} encoded tokens have keys, {held[1]} values: expected the same, or none"
    except ValueError as error:
        return str(error)
    return ""


def _misfit(codec: SpanCodec | None, tensors: Sequence[Tensor], a: AttentionPacked, tokens: int) -> str:
    """Why tensors are not ``tokens`` tokens that a codec stores, or ""."""
    batch, _, heads, size = a.q.shape
    if codec is None:
        want = (batch, tokens, heads, size)
        if len(tensors) == 1 and tensors[0].dtype == a.q.dtype and tuple(tensors[0].shape) == want:
            return ""
        return f" are {_shown(tensors)}: expected {a.q.dtype} {want}, one tensor, as the codec says that it is exact"
    fields = codec.stored(heads, size, a.span)
    if len(tensors) != len(fields):
        return f" are {len(tensors)} tensors: the codec stores {', '.join(field.name for field in fields)}"
    spans = count_spans(fields, tensors, a.span)
    if not spans * a.span - a.span < tokens <= spans * a.span:
        return f" are {spans} spans of {a.span} tokens, cos has {tokens}: expected so many without a part of the first"
    for field, tensor in zip(fields, tensors, strict=True):
        lead = (batch, spans * a.span if field.per == "token" else spans)[: LEADING_AXES[field.per]]
        form = (*lead, *field.shape)
        if tensor.dtype != field.dtype or tuple(tensor.shape) != form:
            return f".{field.name} is {tensor.dtype} {tuple(tensor.shape)}: expected {field.dtype} {form}"
    return ""


def _shown(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)


def _fake(a: AttentionPacked) -> Tensor:
    batch, rows, heads, size = a.q.shape
    return a.q.new_empty((batch, rows, heads * size))


def _samples() -> Sequence[AttentionPacked]:
    random = torch.Generator().manual_seed(6)
    exact = {"codec": "exact", "dtype": "float32"}
    settings = {"codec": "per_token", "bits": 8, "block": 8, "asymmetric": False, "scale_dtype": "bfloat16"}
    planes = {"codec": "klt", "bits": 1.0, "joint": False, "rank": 10, "fit": "video"}
    integers = {"codec": "int8_attention"}
    cases: list[AttentionPacked] = []
    for rows, lengths, spans, gone, keys, values, dtype in (
        (6, (2, 6), 2, 0, exact, exact, torch.float32),
        (5, (0, 3, 5), 3, 2, settings, exact, torch.float32),
        (4, (1, 4), 2, 1, exact, settings, torch.bfloat16),
        (3, (0, 3), 0, 0, settings, None, torch.float32),
        (5, (3, 5), 2, 3, planes, planes, torch.float32),
        (4, (4,), 2, 0, settings, planes, torch.bfloat16),
        (5, (0, 3), 3, 2, integers, integers, torch.float32),
        (4, (4,), 2, 0, integers, integers, torch.bfloat16),
    ):

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)

        def stored(
            settings: Mapping[str, object] | None, tokens: int, kind: str, dtype: torch.dtype = dtype
        ) -> list[Tensor]:
            if settings is None:
                return [normal(2, tokens, 2, 16, dtype=dtype)]
            if settings["codec"] == "exact":
                return [normal(2, tokens, 2, 16)]
            if settings["codec"] == "klt":
                bits = torch.randint(0, 256, (2, tokens // 4, 32, 1), generator=random, dtype=torch.uint8)
                width = torch.tensor([4, 3, 2, 2, 1, 1, 1, 0, 2, 0], dtype=torch.uint8).expand(2, 2, -1).contiguous()
                fitted = [normal(2, 2, *rest, dtype=torch.bfloat16) for rest in ((16,), (16, 10), (10,))]
                return [bits, *fitted[:2], fitted[2].abs(), width]
            codes = torch.randint(0, 255, (2, tokens, 2, 16), generator=random, dtype=torch.uint8)
            if settings["codec"] == "int8_attention":
                signed, spread = (codes.int() - 127).to(torch.int8), normal(2, tokens, 2).abs() / 127
                mean = normal(2, tokens // 4, 2, 16)
                return [signed, spread, mean] if kind == "keys" else [signed, mean.abs().unsqueeze(2) / 127]
            return [codes, normal(2, tokens, 2, 2, dtype=torch.bfloat16).abs() / 127]

        angle = torch.rand(spans * 4 - gone, 8, generator=random, dtype=torch.float32) * 6
        k, v = ([normal(2, length, 2, 16, dtype=dtype) for length in lengths] for _ in range(2))
        packed_k, packed_v = stored(keys, 4 * spans, "keys"), stored(values, 4 * spans, "values")
        text = json.dumps({"keys": keys, "values": values} | ({"attention": "int8"} if keys is integers else {}))
        q = normal(2, rows, 2, 16, dtype=dtype)
        cases.append(AttentionPacked(q, k, v, packed_k, packed_v, angle.cos(), angle.sin(), text, 4))
    return cases


@declare(AttentionPacked, fake=_fake, samples=_samples, supports=_supports, max_error=2**-6)
def attention_packed(a: AttentionPacked) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim)) v`` over the pieces of k and v and the encoded spans, no mask.

    At most one span of keys and values is decoded at a time; what was read of it is merged in float32. Values that a
    codec gives as coefficients are not decoded: what their weights make of them is. Where the settings say that
    attention multiplies what codecs store, it is ``fxq::attention_int8`` over the pieces and the spans behind them.

    Returns:
        [B, S, heads * head_dim] in q's dtype, contiguous.

    Raises:
        ValueError: on a wrong dtype or shape, and on settings that name no codec or do not fit the shapes.
    """
    if multiplies_integers(a):
        return _attend_integers(a)
    found = attention_lse(a.q, a.k[0], a.v[0])
    for k, v in zip(a.k[1:], a.v[1:], strict=True):
        found = merge(found, attention_lse(a.q, k, v))
    for part in parts(a):
        found = merge(found, _attend(a, part))
    return found[0].to(a.q.dtype).flatten(2).contiguous()


def _attend(a: AttentionPacked, part: Part) -> tuple[Tensor, Tensor]:
    if (values := coefficients(a, part)) is None:
        return attention_lse(a.q, rotated(a, part), decoded(a, "values", part))
    out, lse = attention_lse(a.q, rotated(a, part), values.x)
    return channels(out, values.basis, values.mean), lse


def multiplies_integers(a: AttentionPacked) -> bool:
    """Whether a call's products are of the integers that its codecs store."""
    codec = codecs_of(a.codec)[0]
    return codec is not None and codec.integers


class Stored(NamedTuple):
    """What the codecs of keys and values store of one span of T tokens.

    Attributes:
        key_codes: int8 [B, T, heads, head_dim], of keys less ``mean``.
        key_scale: float32 [B, T, heads].
        mean: float32 [B, heads, head_dim].
        value_codes: int8 [B, T, heads, head_dim].
        value_scale: float32 [B, blocks, heads, head_dim], of VALUE_BLOCK tokens each.
        skip: first tokens that are evicted.
    """

    key_codes: Tensor
    key_scale: Tensor
    mean: Tensor
    value_codes: Tensor
    value_scale: Tensor
    skip: int


def stored_spans(a: AttentionPacked) -> Iterator[Stored]:
    """The spans of a call, in their order, as views."""
    keys, values = codecs_of(a.codec)
    assert keys is not None and values is not None
    for part in parts(a):
        k, v = of_span(keys, a.packed_k, a, part.number), of_span(values, a.packed_v, a, part.number)
        yield Stored(k["codes"], k["scale"], k["mean"][:, 0], v["codes"], v["scale"][:, 0], part.skip)


def piece_of(span: Stored) -> Piece:
    """A span as the definition of attention in 8 bits reads it, without the tokens that are evicted."""
    blocks = []
    for number in range(span.value_scale.shape[1]):
        tokens = slice(max(number * VALUE_BLOCK, span.skip), (number + 1) * VALUE_BLOCK)
        if tokens.start >= min(tokens.stop, span.key_codes.shape[1]):
            continue
        keys, values = (x[:, tokens].transpose(1, 2).float() for x in (span.key_codes, span.value_codes))
        key_scale = span.key_scale[:, tokens].transpose(1, 2).unsqueeze(3)
        blocks.append(Block(keys, key_scale, values, span.value_scale[:, number].unsqueeze(2)))
    return Piece(span.mean, blocks)


def _attend_integers(a: AttentionPacked) -> Tensor:
    """``fxq::attention_int8`` over the pieces of k and v and the spans behind them: the reference.

    Returns:
        [B, S, heads * head_dim] in q's dtype.
    """
    exact = [quantized(k, v) for k, v in zip(a.k, a.v, strict=True)]
    return attended(a.q, [*exact, *(piece_of(span) for span in stored_spans(a))])


def _attend_integers_natively(a: AttentionPacked) -> Tensor:
    """As :func:`_attend_integers` by the native kernel; in float32 for float16."""
    dtype = torch.float32 if a.q.dtype == torch.float16 else a.q.dtype
    spans = list(stored_spans(a))
    means = torch.stack([*(key_mean(k) for k in a.k), *(span.mean for span in spans)])
    exact = Attention(a.q.to(dtype), [k.to(dtype) for k in a.k], [v.to(dtype) for v in a.v])
    out = torch.empty((*a.q.shape[:2], a.q.shape[2] * a.q.shape[3]), dtype=dtype)
    coded = [Coded(s.key_codes, s.key_scale, s.value_codes, s.value_scale, s.skip) for s in spans]
    return native.attention_int8(exact, means, out, coded).to(a.q.dtype)


def _on_cpu() -> str:
    unpacks = f"{native.name()} unpack" if native.ready() else "reference"
    return native.name() if native.attends() else unpacks


@attention_packed.on("cpu", _on_cpu)
def attention_packed_cpu(a: AttentionPacked) -> Tensor:
    """Native kernels decode spans inside attention, a head at a time, or before it in other dtypes; else the reference.

    Codecs without a form are decoded by torch, span by span.
    """
    if not native.ready() or not a.q.numel():
        return attention_packed.compute(a)
    if multiplies_integers(a):
        return _attend_integers_natively(a)
    inside = native.attends(a.q.dtype)
    found = []
    if inside and any(k.shape[1] for k in a.k):
        found.append(native.attention_lse(Attention(a.q, a.k, a.v)))
    elif not inside:
        found += [attention_lse(a.q, k, v) for k, v in zip(a.k, a.v, strict=True)]
    each = list(parts(a))
    readers = [Reader(a, "keys"), Reader(a, "values", short=True)] if each else []
    for part in each:
        keys, values = readers
        if inside:
            tokens, tables = part.last - part.first, keys.tables(part)
            others = found.pop() if found and not values.short else None
            out, lse = unpack.attention_lse(a.q, keys.side(part), values.side(part), tokens, tables, others)
        else:
            out, lse = attention_lse(a.q, keys.dense(part), values.dense(part))
        found[:] = [functools.reduce(merge, [*found, (values.back(out), lse)])]
    out, _ = functools.reduce(merge, found) if found else attention_lse(a.q, a.k[0], a.v[0])
    return out.to(a.q.dtype).flatten(2).contiguous()


if HAS_TRITON:

    @attention_packed.on("cuda", "triton")
    def attention_packed_cuda(a: AttentionPacked) -> Tensor:
        """Launch on the device that holds q; heads that no tile holds take the reference, with a warning."""
        if a.q.shape[3] > packed_triton.MOST_SIZE:
            message = f"heads of {a.q.shape[3]} channels run the reference: the kernel takes {packed_triton.MOST_SIZE}"
            warnings.warn(f"fxq::attention_packed: {message}", stacklevel=2)
            return attention_packed.compute(a)
        with torch.cuda.device(a.q.device):
            if multiplies_integers(a):
                major, minor = torch.cuda.get_device_capability()
                return triton_stored.attend(a, 10 * major + minor)
            return packed_triton.attend(a)
