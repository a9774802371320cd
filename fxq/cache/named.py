"""Codecs as operators take them: a text of settings, and what reads the tensors that such codecs store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind
from fxq.cache.codecs.record import Field, Record, Shape
from fxq.cache.settings import CacheSettingsError, codec_from_json, codec_to_json
from fxq.kernels.attention.codecs import Coefficients, register
from fxq.kernels.attention.forms import Form
from fxq.runtime.reading import ReadError, parse_json

INTEGERS = "int8"
"""What texts say of attention that multiplies what codecs store."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """A codec for keys or for values, as :class:`fxq.kernels.attention.codecs.SpanCodec`."""

    codec: Codec
    kind: Kind
    integers: bool = False

    @property
    def rotated(self) -> bool:
        """The codec's."""
        return self.codec.rotated

    def stored(self, heads: int, head_dim: int, span: int) -> Sequence[Field]:
        """The codec's fields."""
        return self.codec.fields(Shape(heads, head_dim, span), self.kind)

    def decode(self, tensors: Mapping[str, Tensor], heads: int, head_dim: int, span: int) -> Tensor:
        """The codec's numbers."""
        return self.codec.decode(self._record(tensors, Shape(heads, head_dim, span)), self.kind)

    def coefficients(self, tensors: Mapping[str, Tensor], heads: int, head_dim: int, span: int) -> Coefficients | None:
        """The codec's coefficients."""
        return self.codec.coefficients(self._record(tensors, Shape(heads, head_dim, span)), self.kind)

    def _record(self, tensors: Mapping[str, Tensor], shape: Shape) -> Record:
        return Record(self.codec.fields(shape, self.kind), tensors, shape)

    def form(self, heads: int, head_dim: int, span: int) -> Form | None:
        """The codec's form."""
        return self.codec.form(Shape(heads, head_dim, span), self.kind)


def codecs_text(keys: Codec | None, values: Codec | None, integers: bool = False) -> str:
    """What operators take for a layer's codecs; the same for equal settings.

    Args:
        keys: codec of keys.
        values: codec of values.
        integers: whether attention multiplies what both of them store, see :class:`~fxq.cache.codecs.codec.Codec`.
    """
    found = {"keys": keys, "values": values}
    settings: dict[str, object] = {kind: None if codec is None else _plain(codec) for kind, codec in found.items()}
    if integers:
        settings["attention"] = INTEGERS
    return json.dumps(settings, sort_keys=True, separators=(",", ":"))


def _plain(codec: Codec) -> dict[str, object]:
    """Settings with every number in the type that the codec declares."""
    return codec_to_json(codec_from_json(codec_to_json(codec)))


def codecs_from_text(text: str) -> tuple[Bound | None, Bound | None]:
    """Inverse of :func:`codecs_text`.

    Raises:
        CacheSettingsError: for a text of another form, an unknown codec, or a setting that it does not take.
    """
    try:
        settings = parse_json(text)
    except ReadError as error:
        raise CacheSettingsError(f"the settings of the codecs are {error}") from None
    integers = isinstance(settings, dict) and settings.pop("attention", None)
    if not isinstance(settings, dict) or set(settings) != {"keys", "values"} or integers not in (None, INTEGERS):
        raise CacheSettingsError('the settings of the codecs: expected {"keys": ..., "values": ...}')

    def bound(kind: Kind) -> Bound | None:
        if settings[kind] is None:
            return None
        return Bound(codec_from_json(settings[kind], kind), kind, integers is not None)

    pair = bound("keys"), bound("values")
    if integers is not None and not all(each is not None and each.codec.integers for each in pair):
        raise CacheSettingsError("attention in 8 bits multiplies what int8_attention stores of both keys and values")
    return pair


def stored_alike(text: str) -> str:
    """The text of the same codecs without what attention does with them."""
    keys, values = codecs_from_text(text)
    return codecs_text(None if keys is None else keys.codec, None if values is None else values.codec)


register(codecs_from_text)
