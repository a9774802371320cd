"""Encoded spans as attention reads them: how many tokens there are, and one span of them decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from fxq.kernels.arguments import AttentionPacked, RmsNormRope
from fxq.kernels.attention.codecs import Coefficients, SpanCodec, StoredTensor, codecs_of
from fxq.kernels.rope.op import rms_norm_rope


def count_spans(fields: Sequence[StoredTensor], tensors: Sequence[Tensor], span: int) -> int:
    """Number of spans that tensors hold."""
    for field, tensor in zip(fields, tensors, strict=False):
        if field.per in ("token", "span") and tensor.ndim > 1:
            return tensor.shape[1] // (span if field.per == "token" else 1)
    return 0


def tokens_held(a: AttentionPacked, kind: str) -> int:
    """Number of tokens whose keys, or values, are stored; those of the first span that are evicted count."""
    codec = codecs_of(a.codec)[kind == "values"]
    tensors = a.packed_k if kind == "keys" else a.packed_v
    if codec is None:
        return tensors[0].shape[1] if tensors and tensors[0].ndim == 4 else 0
    return count_spans(codec.stored(a.q.shape[2], a.q.shape[3], a.span), tensors, a.span) * a.span


class Part(NamedTuple):
    """Span ``number``, whose tokens but the first ``skip`` are ``first`` to ``last`` of the tables."""

    number: int
    first: int
    last: int
    skip: int


def parts(a: AttentionPacked) -> Iterator[Part]:
    """The spans, without the tokens that are evicted."""
    tokens = a.cos.shape[0] if tokens_held(a, "keys") else 0
    skip = -tokens % a.span
    for number in range((tokens + skip) // a.span):
        start = number * a.span - skip
        yield Part(number, max(start, 0), start + a.span, max(-start, 0))


def decoded(a: AttentionPacked, kind: str, part: Part) -> Tensor:
    """Keys as they are stored, or values, of a part, [B, tokens, heads, head_dim] in q's dtype."""
    codec = codecs_of(a.codec)[kind == "values"]
    tensors = a.packed_k if kind == "keys" else a.packed_v
    if codec is None:
        return tensors[0][:, part.first : part.last]
    _, _, heads, size = a.q.shape
    own = of_span(codec, tensors, a, part.number)
    return codec.decode(own, heads, size, a.span)[:, part.skip :].to(a.q.dtype)


def coefficients(a: AttentionPacked, part: Part) -> Coefficients | None:
    """Values of a part as coefficients of few vectors; None where their codec has none."""
    if (codec := codecs_of(a.codec)[1]) is None:
        return None
    _, _, heads, size = a.q.shape
    found = codec.coefficients(of_span(codec, a.packed_v, a, part.number), heads, size, a.span)
    return None if found is None else found._replace(x=found.x[:, part.skip :])


def of_span(codec: SpanCodec, tensors: Sequence[Tensor], a: AttentionPacked, number: int) -> dict[str, Tensor]:
    """What a codec stores of one span, by name."""
    fields = codec.stored(a.q.shape[2], a.q.shape[3], a.span)
    return {f.name: cut(f, tensor, number, a.span) for f, tensor in zip(fields, tensors, strict=True)}


def rotated(a: AttentionPacked, part: Part) -> Tensor:
    """As :func:`decoded` of keys, rotated; those that no codec stored are already, and so are those of some codecs."""
    x, codec = decoded(a, "keys", part), codecs_of(a.codec)[0]
    if codec is None or codec.rotated:
        return x
    cos, sin = a.cos[part.first : part.last], a.sin[part.first : part.last]
    return rms_norm_rope.compute(RmsNormRope(x.flatten(2), None, 0.0, cos, sin, x.shape[2]))


def cut(field: StoredTensor, tensor: Tensor, number: int, span: int) -> Tensor:
    """The part of a stored tensor that belongs to one span."""
    if field.per == "span":
        return tensor[:, number : number + 1]
    return tensor[:, number * span : (number + 1) * span] if field.per == "token" else tensor
