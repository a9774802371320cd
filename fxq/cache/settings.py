"""A cache policy as data: what recipes, bundles and saved states hold of it."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fxq.cache.absorb import Absorb
from fxq.cache.codecs import CODECS, PRESETS
from fxq.cache.codecs.codec import Codec
from fxq.cache.policy import CachePolicy
from fxq.runtime.messages import did_you_mean

_T = TypeVar("_T")


class CacheSettingsError(ValueError):
    """A cache policy that is unknown, malformed or impossible."""


def codec_to_json(codec: Codec) -> dict[str, object]:
    """``{"codec": name, ...settings}``."""
    return {"codec": codec.name, **dataclasses.asdict(codec)}


def codec_from_json(data: object, where: str = "codec") -> Codec:
    """A codec from a preset's name, a codec's name or :func:`codec_to_json`'s form with settings left out.

    Raises:
        CacheSettingsError: on an unknown name or setting (naming a close one) or a value that no codec takes.
    """
    if isinstance(data, str):
        if data in PRESETS:
            return PRESETS[data]
        data = {"codec": data}
    if not isinstance(data, dict):
        raise CacheSettingsError(f"{where}: expected a name or a table of settings, got {type(data).__name__}")
    settings = dict(data)
    name = settings.pop("codec", None)
    if not isinstance(name, str) or name not in CODECS:
        raise CacheSettingsError(f"{where}: unknown codec {name!r}{_hint(name, [*CODECS, *PRESETS])}")
    return _validated(CODECS[name], settings, where)


def policy_to_json(policy: CachePolicy) -> dict[str, object]:
    """The policy's fields; codecs as :func:`codec_to_json` has them."""

    def codecs(chosen: Any) -> object:
        if isinstance(chosen, tuple):
            return [None if codec is None else codec_to_json(codec) for codec in chosen]
        return None if chosen is None else codec_to_json(chosen)

    data = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    layers = None if policy.layers is None else list(policy.layers)
    absorb = None if policy.absorb is None else dataclasses.asdict(policy.absorb)
    return data | {"keys": codecs(policy.keys), "values": codecs(policy.values), "layers": layers, "absorb": absorb}


def policy_from_json(data: object) -> CachePolicy:
    """Inverse of :func:`policy_to_json`; settings may be left out, codecs may be presets' names.

    Raises:
        CacheSettingsError: naming the setting.
    """
    if not isinstance(data, dict):
        raise CacheSettingsError(f"cache: expected a table of settings, got {type(data).__name__}")
    settings = dict(data)
    for kind in ("keys", "values"):
        chosen = settings.get(kind)
        if isinstance(chosen, list | tuple):
            parts = [None if c is None else codec_from_json(c, f"cache.{kind}[{i}]") for i, c in enumerate(chosen)]
            settings[kind] = tuple(parts)
        elif chosen is not None:
            settings[kind] = codec_from_json(chosen, f"cache.{kind}")
    if isinstance(absorb := settings.get("absorb"), dict):
        settings["absorb"] = _validated(Absorb, absorb, "cache.absorb")
    return _validated(CachePolicy, settings, "cache")


def _validated(cls: type[_T], settings: dict[str, object], where: str) -> _T:
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if unknown := [key for key in settings if key not in known]:
        raise CacheSettingsError(f"{where}: unknown setting {unknown[0]!r}{_hint(unknown[0], known)}")
    hints, checked = get_type_hints(cls), {}
    for key, value in settings.items():
        try:
            codec = isinstance(value, Codec) or (isinstance(value, tuple) and any(isinstance(v, Codec) for v in value))
            checked[key] = (
                value
                if codec
                else TypeAdapter(hints[key], config={"arbitrary_types_allowed": True}).validate_python(value)
            )
        except ValidationError as error:
            raise CacheSettingsError(f"{where}.{key}: {error.errors()[0]['msg']}") from None
    try:
        return cls(**checked)
    except ValueError as error:
        raise CacheSettingsError(f"{where}: {error}") from None


def _hint(name: object, known: list[str]) -> str:
    return f"; {did_you_mean(str(name), known, 0.5) or 'known: ' + ', '.join(known)}"
