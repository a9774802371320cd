"""Unmasked attention to a cache whose old tokens are encoded: one span at a time is decoded, read and forgotten."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxq.kernels import native
from fxq.kernels.arguments import Attention, AttentionPacked
from fxq.kernels.attention import op
from fxq.kernels.attention import triton as packed_triton
from fxq.kernels.attention.codecs import LEADING_AXES, SpanCodec, channels, codecs_of
from fxq.kernels.attention.merge import attention_lse, merge
from fxq.kernels.attention.sides import Reader
from fxq.kernels.attention.spans import Part, coefficients, count_spans, decoded, parts, rotated, tokens_held
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.native import unpack
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
    if tokens and not spans * a.span - a.span < tokens <= spans * a.span:
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
    cases: list[AttentionPacked] = []
    for rows, lengths, spans, gone, keys, values, dtype in (
        (6, (2, 6), 2, 0, exact, exact, torch.float32),
        (5, (0, 3, 5), 3, 2, settings, exact, torch.float32),
        (4, (1, 4), 2, 1, exact, settings, torch.bfloat16),
        (3, (0, 3), 0, 0, settings, None, torch.float32),
        (5, (3, 5), 2, 3, planes, planes, torch.float32),
        (4, (4,), 2, 0, settings, planes, torch.bfloat16),
    ):

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)

        def stored(settings: Mapping[str, object] | None, tokens: int, dtype: torch.dtype = dtype) -> list[Tensor]:
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
            return [codes, normal(2, tokens, 2, 2, dtype=torch.bfloat16).abs() / 127]

        angle = torch.rand(spans * 4 - gone, 8, generator=random, dtype=torch.float32) * 6
        k, v = ([normal(2, length, 2, 16, dtype=dtype) for length in lengths] for _ in range(2))
        packed_k, packed_v = stored(keys, 4 * spans), stored(values, 4 * spans)
        text = json.dumps({"keys": keys, "values": values})
        q = normal(2, rows, 2, 16, dtype=dtype)
        cases.append(AttentionPacked(q, k, v, packed_k, packed_v, angle.cos(), angle.sin(), text, 4))
    return cases


@declare(AttentionPacked, fake=_fake, samples=_samples, supports=_supports, max_error=2**-6)
def attention_packed(a: AttentionPacked) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim)) v`` over the pieces of k and v and the encoded spans, no mask.

    At most one span of keys and values is decoded at a time; what was read of it is merged in float32. Values that a
    codec gives as coefficients are not decoded: what their weights make of them is.

    Returns:
        [B, S, heads * head_dim] in q's dtype, contiguous.

    Raises:
        ValueError: on a wrong dtype or shape, and on settings that name no codec or do not fit the shapes.
    """
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
            return packed_triton.attend(a)
