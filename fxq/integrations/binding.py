"""Which parameter of a model is which layer of a bundle: what the compile backend chooses integers by."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxq.integrations import content
from fxq.integrations.swap import Bundle, QuantizedLinear, match, read_layers

HOW_TO_BIND = 'pass options={"fxq.recipe": fxq.bind(model, bundle)} with the whole calibrated model'


class BackendError(ValueError):
    """A model or call that the backend cannot serve with the bundle it was given."""


@dataclasses.dataclass
class Entry:
    """A parameter, its state when it was bound, and its layer; None: it stays in model dtype, or is a bias.

    ``sums`` are the check sums of its slices, of which a call looks at one, ``turn``; empty where edits do not matter.
    """

    name: str
    parameter: weakref.ref[Tensor]
    state: tuple[int, int]
    layer: QuantizedLinear | None
    sums: list[int] = dataclasses.field(default_factory=list)
    turn: int = 0

    def next_sum(self, tensor: Tensor) -> tuple[int | Tensor, int]:
        """The check sum of the slice whose turn it is, and what it was."""
        index = self.turn % len(self.sums)
        self.turn = index + 1
        return content.check_sum(tensor, index, len(self.sums)), self.sums[index]


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is edited in place by an operator, moved or cast."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _sums(tensor: Tensor) -> list[int]:
    count = content.slices(tensor)
    return [int(content.check_sum(tensor, i, count)) for i in range(count)]


class Binding:
    """Which parameter of a model is which layer of a bundle; made by :func:`bind`."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._pairs: set[tuple[int, int]] = set()
        self._served: set[int] = set()

    def add(self, name: str, parameter: Tensor, layer: QuantizedLinear | None) -> None:
        """Bind a parameter; ``layer`` goes to its device, None means that it stays in model dtype."""
        layer = layer if layer is None else layer.to(parameter.device)
        sums = [] if layer is None else _sums(parameter)
        self._entries[id(parameter)] = Entry(name, weakref.ref(parameter), _state(parameter), layer, sums)

    def find(self, tensor: object) -> Entry | None:
        """The entry of a tensor if it is a bound parameter."""
        entry = self._entries.get(id(tensor))
        return entry if entry is not None and entry.parameter() is tensor else None

    def layer_of(self, weight: Tensor, bias: Tensor | None = None) -> QuantizedLinear | None:
        """As :meth:`layers_of` for one linear."""
        return self.layers_of([(weight, bias)])[0]

    def layers_of(self, linears: Sequence[tuple[Tensor, Tensor | None]]) -> list[QuantizedLinear | None]:
        """The layers of linears given by weight [N, K] and bias [N], or None where one stays in model dtype.

        The memory of weights and biases is compared with what was bound: up to 4 MiB whole, of more a part that is
        spread over all of it, another at every call.

        Raises:
            BackendError: when a weight is not of the bound model, or it or the bias was edited, moved or cast since.
        """
        layers, looks = list[QuantizedLinear | None](), list[tuple[Entry, int | Tensor, int]]()
        for weight, bias in linears:
            entry = self.find(weight)
            if entry is None:
                raise BackendError(
                    f"a linear was called with a weight {tuple(weight.shape)} that is not bound to a bundle, because "
                    f"the compiled code is shared with another module or the weight is new: {HOW_TO_BIND}"
                )
            layers.append(entry.layer)
            if entry.layer is None:
                continue
            bound = [(entry, weight)]
            if (other := self._bias(entry, entry.layer, weight, bias)) is not None and bias is not None:
                bound.append((other, bias))
            for known, tensor in bound:
                if known.state != _state(tensor):
                    raise _edited(known)
                looks.append((known, *known.next_sum(tensor)))
            self._served.add(id(entry.layer))
        for known, was, now in _read(looks):
            if was != now:
                raise _edited(known)
        return layers

    def _bias(self, entry: Entry, layer: QuantizedLinear, weight: Tensor, bias: Tensor | None) -> Entry | None:
        """The entry of a linear's bias; at first sight its values are compared with those in the layer."""
        known = None if bias is None else self.find(bias)
        pair = id(weight), id(bias)
        if pair in self._pairs and (known is not None or bias is None):
            return known
        if not layer.has_values_of(bias):
            raise BackendError(
                f"the bias of {entry.name} is another one than was quantized: it was edited or replaced after it was "
                "bound, or set to None; quantize the model again"
            )
        if bias is not None:
            name = f"the bias of {entry.name}" if known is None else known.name
            state = _state(bias) if known is None else known.state
            known = self._entries[id(bias)] = Entry(name, weakref.ref(bias), state, None, _sums(bias))
        self._pairs.add(pair)
        return known

    def unserved(self) -> list[str]:
        """Layers that no compiled code has used so far: look here after the first calls of a model compiled in parts.

        Modules that are called outside of the compiled parts run with float weights; compile them too.
        """
        layers = [entry.layer for entry in self._entries.values() if entry.layer is not None]
        return [layer.plan.layer for layer in layers if id(layer) not in self._served]


def _read(looks: list[tuple[Entry, int | Tensor, int]]) -> list[tuple[Entry, int, int]]:
    """The check sums as numbers; those of a device are fetched at once."""
    found = {i: now for i, (_, now, _) in enumerate(looks) if isinstance(now, int)}
    away = {i: now for i, (_, now, _) in enumerate(looks) if isinstance(now, Tensor)}
    for device in {now.device for now in away.values()}:
        here = {i: now for i, now in away.items() if now.device == device}
        found |= dict(zip(here, torch.stack(list(here.values())).tolist(), strict=True))
    return [(entry, found[i], was) for i, (entry, _, was) in enumerate(looks)]


def _edited(entry: Entry) -> BackendError:
    return BackendError(
        f"{entry.name} was edited, moved or cast after it was bound, its integers may not belong to it any more: "
        "quantize the model again, or bind it again when its values are the same"
    )


def bind(model: nn.Module, bundle: Bundle) -> Binding:
    """Tell the backend which parameter is which layer; needed when parts of a model are compiled on their own.

    Bind when the model has its device, dtype and weights: the integers go where the float weights are.

    Args:
        model: the whole model that was calibrated; not changed, and not kept alive by the result.
        bundle: a bundle's folder, or a module of :func:`fxq.quantize` or :func:`fxq.load`.

    Returns:
        The value of ``options={"fxq.recipe": ...}`` for every ``compile`` of the model or of its parts.

    Raises:
        BundleError: as :func:`fxq.load`.
        ApplyError: when names, shapes or values of the weights do not fit the bundle.
    """
    layers, kept = read_layers(bundle)
    layer_of = {id(weight): layers[layer] for layer, weight in match(model, layers, kept).items()}
    binding = Binding()
    for name, parameter in model.named_parameters():
        binding.add(name, parameter, layer_of.get(id(parameter)))
    return binding
