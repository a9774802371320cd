"""Encoded spans as native kernels take them: what a codec stores, by its form, without a dense copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxq.kernels.arguments import AttentionPacked
from fxq.kernels.attention.codecs import channels, codecs_of
from fxq.kernels.attention.forms import Blocks, Form, Numbers, Planes
from fxq.kernels.attention.spans import Part, cut, decoded
from fxq.kernels.native import unpack
from fxq.kernels.native.unpack import Side, side

MOST_BITS = 8
"""Widest coefficient of bit planes."""


class Reader:
    """Reads keys, or values, of one call span by span.

    Args:
        a: the call.
        kind: ``keys`` or ``values``.
        short: read values as coefficients where a head has as many channels or more (:meth:`back` makes channels).

    Raises:
        ValueError: when bit planes are not as many as the widths of their coefficients say.
    """

    def __init__(self, a: AttentionPacked, kind: str, short: bool = False) -> None:
        self.a, self.kind, codec = a, kind, codecs_of(a.codec)[kind == "values"]
        self.batch, _, self.heads, self.channels = a.q.shape
        self.form: Form | None = None if codec is None else codec.form(self.heads, self.channels, a.span)
        tensors = a.packed_k if kind == "keys" else a.packed_v
        self.fields = [] if codec is None else list(codec.stored(self.heads, self.channels, a.span))
        self.stored = {field.name: t for field, t in zip(self.fields, tensors, strict=codec is not None)}
        self.planes = _Fitted(self.stored, self.form, self.heads) if isinstance(self.form, Planes) else None
        self.short = short and self.planes is not None and self.planes.used <= self.channels
        self.rotates = kind == "keys" and codec is not None and not codec.rotated

    def side(self, part: Part) -> Side:
        """What is stored of a part; a codec without a form, and numbers of another dtype, are made dense by torch."""
        own = {field.name: cut(field, self.stored[field.name], part.number, self.a.span) for field in self.fields}
        if self.planes is not None:
            return self.planes.side(own["planes"], self.channels, part.skip, self.short)
        if isinstance(self.form, Blocks):
            return _blocks(self.form, own, self.channels, part.skip)
        if isinstance(self.form, Numbers) and own["x"].dtype == torch.float8_e4m3fn:
            return _bytes(self.form, own, part.skip)
        if isinstance(self.form, Numbers) and own["x"].dtype in (torch.float32, torch.bfloat16):
            return _rows(own["x"][:, part.skip :])
        return _rows(decoded(self.a, self.kind, part))

    def back(self, out: Tensor) -> Tensor:
        """Channels of what attention made of values, float32 [B, S, heads, head_dim]."""
        if not self.short or self.planes is None:
            return out
        basis, mean = self.planes.basis, self.planes.mean
        form = (len(basis), self.heads, self.channels)
        return channels(out, basis.transpose(-1, -2).reshape(*form, -1), mean.reshape(form))

    def tables(self, part: Part) -> unpack.Tables:
        """Those of a part's keys; None where they are rotated already, and for values."""
        if not self.rotates:
            return None
        return self.a.cos[part.first : part.last].contiguous(), self.a.sin[part.first : part.last].contiguous()

    def dense(self, part: Part) -> Tensor:
        """The part in the queries' dtype [B, tokens, heads, size], keys rotated."""
        dtype = self.a.q.dtype if self.a.q.dtype == torch.bfloat16 else torch.float32
        found = unpack.unpack(self.side(part), self.batch, part.last - part.first, dtype, self.tables(part))
        return found.to(self.a.q.dtype)


class _Fitted:
    """What bit planes of all spans are read by; up to the last coefficient that has bits in any head.

    Attributes:
        used: so many coefficients.
        basis: float32 [videos or 1, groups, used, channels].
        mean: float32 [videos or 1, groups, channels].
    """

    def __init__(self, stored: Mapping[str, Tensor], form: Planes, heads: int) -> None:
        width, planes = stored["width"], stored["planes"].shape[2]
        self.heads, self.groups = heads, form.groups
        self.width = width.reshape(-1, form.groups, width.shape[-1]).contiguous()
        bits = self.width.flatten(1).int()
        if bool((bits.sum(1) != planes).any()) or int(bits.max()) > MOST_BITS:
            raise ValueError(
                f"widths of coefficients sum to {bits.sum(1).tolist()} with {int(bits.max())} at most: expected "
                f"{planes}, the bit planes there are, and {MOST_BITS}; read what the codec stored"
            )
        self.plane = (bits.cumsum(1) - bits).int().contiguous()
        self.used = int((self.width.flatten(0, 1) > 0).any(0).nonzero().max()) + 1
        self.step = stored["step"].float().contiguous()
        basis, mean = stored["basis"].float(), stored["mean"].float()
        self.basis = basis.view(-1, *basis.shape[-3:])[..., : self.used].transpose(-1, -2).contiguous()
        self.mean = mean.view(-1, *mean.shape[-2:]).contiguous()

    def side(self, planes: Tensor, size: int, first: int, short: bool) -> Side:
        """Of a span's planes [B, 1, planes, bytes]."""
        planes = planes if planes.stride(-1) == 1 else planes.contiguous()
        return side(
            self.heads,
            self.used if short else size,
            kind=unpack.PLANES,
            x=planes,
            x_batch=planes.stride(0),
            x_row=planes.stride(2),
            first=first,
            width=self.width,
            plane=self.plane,
            step=self.step,
            basis=None if short else self.basis,
            mean=self.mean,
            channels=self.mean.shape[-1],
            fitted=len(self.width),
            groups=self.groups,
            rank=self.width.shape[-1],
            used=self.used,
            plane_bytes=planes.shape[-1],
        )


def _blocks(form: Blocks, own: Mapping[str, Tensor], size: int, first: int) -> Side:
    codes = _dense_rows(own["codes"])
    scale, zero = (own[name].float().contiguous() if name in own else None for name in ("scale", "zero"))
    assert scale is not None
    found: dict[str, Tensor | int | None] = {}
    if form.stages:
        ids, centroids = (_dense_rows(own[name]) for name in ("ids", "centroids"))
        found = {"ids": ids, "ids_batch": ids.stride(0), "ids_row": ids.stride(1)}
        found |= {"centroids": centroids, "centroids_batch": centroids.stride(0), "id_bits": form.id_bits}
        found |= {"stages": form.stages, "count": form.centroids}
    return side(
        codes.shape[2],
        size,
        kind=unpack.CODES,
        **_places(codes, first),
        bits=form.bits,
        offset=form.offset,
        scale=scale,
        zero=zero,
        scale_batch=scale.stride(0),
        scale_tokens=form.tokens,
        channels=form.channels,
        **found,
    )


def _bytes(form: Numbers, own: Mapping[str, Tensor], first: int) -> Side:
    """Float8 numbers with a scale of each head."""
    x, scale = _dense_rows(own["x"].view(torch.uint8)), own["scale"].contiguous()
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return side(
        x.shape[2],
        x.shape[3],
        kind=unpack.CODES,
        **_places(x, first),
        table=table,
        scale=scale,
        scale_batch=scale.stride(0),
        scale_tokens=form.tokens,
        channels=x.shape[3],
    )


def _rows(x: Tensor) -> Side:
    """Numbers [B, tokens, heads, size] as they lie."""
    x = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    _, _, heads, size = x.shape
    return side(heads, size, kind=unpack.ROWS, **_places(x, 0), is_bfloat16=x.dtype == torch.bfloat16)


def _places(x: Tensor, first: int) -> dict[str, Tensor | int | None]:
    return {"x": x, "x_batch": x.stride(0), "x_row": x.stride(1), "x_head": x.stride(2), "first": first}


def _dense_rows(x: Tensor) -> Tensor:
    """A view where all axes behind the first are contiguous, as in memory that a cache grows in."""
    return x if x[:1].is_contiguous() else x.contiguous()
