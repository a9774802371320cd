"""Names of layers in a bundle and in a model: the same but for wrappers and tools in between."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from fxq.core.config import plain_layer


class NamesError(ValueError):
    """Names that several parts of a model fit."""


@dataclass(frozen=True)
class Renaming:
    """What to take from the front of a bundle's names, and to put there, to get the model's."""

    less: str = ""
    more: str = ""

    def __call__(self, name: str) -> str:
        """The model's name, without the parts that tools put between."""
        return self.more + plain_layer(name).removeprefix(self.less)


def renaming(layers: Collection[str], kept: Collection[str], parameters: Collection[str]) -> Renaming | None:
    """How a bundle's names become a model's: as they are, else below a wrapper, else without one.

    Args:
        layers: names of the bundle.
        kept: the bundle's other names: a wrapper is in front of these too.
        parameters: names of the model's parameters; a layer's is ``<layer>.weight``, or the layer's name itself.

    Returns:
        None where no renaming gives every layer a parameter.

    Raises:
        NamesError: when several parts of the model have all the names.
    """
    known = {plain_layer(name) for name in parameters}
    for less in _fronts([plain_layer(layer) for layer in (*layers, *kept)]):
        first = plain_layer(next(iter(layers))).removeprefix(less)
        found = {""} if less else set()
        for end in (f"{first}.weight", first):
            found |= {name.removesuffix(end) for name in known if name == end or name.endswith(f".{end}")}
        fits = [
            Renaming(less, more)
            for more in sorted(found, key=lambda m: (len(m), m))
            if _fit(Renaming(less, more), layers, known)
        ]
        if Renaming() in fits:
            return Renaming()
        if len(fits) > 1:
            places = ", ".join(repr(fit.more.rstrip(".")) for fit in fits)
            raise NamesError(f"several parts of the model have the layers' names: {places}; give the part itself")
        if fits:
            return fits[0]
    return None


def weights_of(layers: Collection[str], change: Renaming, parameters: Collection[str]) -> Mapping[str, str | None]:
    """By layer the name of its parameter in the model, or None."""
    names = {plain_layer(name): name for name in parameters}
    return {layer: names.get(f"{change(layer)}.weight", names.get(change(layer))) for layer in layers}


def _fit(change: Renaming, layers: Collection[str], known: Collection[str]) -> bool:
    return all(f"{change(layer)}.weight" in known or change(layer) in known for layer in layers)


def _fronts(layers: list[str]) -> Iterator[str]:
    """Nothing, then ever more parts that all names begin with."""
    yield ""
    parts = layers[0].split(".")
    for i in range(1, len(parts)):
        front = ".".join(parts[:i]) + "."
        if not all(layer.startswith(front) for layer in layers):
            return
        yield front
