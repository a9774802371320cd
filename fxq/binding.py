"""Which parameter of a model is which layer of a bundle: what the compile backend chooses integers by."""

from __future__ import annotations

import dataclasses
import weakref

from torch import Tensor, nn

from fxq.apply import Bundle, QuantizedLinear, match, read_layers

HOW_TO_BIND = 'pass options={"fxq.recipe": fxq.bind(model, bundle)} with the whole calibrated model'


class BackendError(ValueError):
    """A model or call that the backend cannot serve with the bundle it was given."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter, its state when it was bound, and its layer; None: it stays in model dtype."""

    name: str
    parameter: weakref.ref[Tensor]
    state: tuple[int, int]
    layer: QuantizedLinear | None


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is edited in place, moved or cast."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class Binding:
    """Which parameter of a model is which layer of a bundle; made by :func:`bind`."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._served: set[int] = set()

    def add(self, name: str, parameter: Tensor, layer: QuantizedLinear | None) -> None:
        """Bind a parameter; ``layer`` goes to its device, None means that it stays in model dtype."""
        layer = layer if layer is None else layer.to(parameter.device)
        self._entries[id(parameter)] = Entry(name, weakref.ref(parameter), _state(parameter), layer)

    def find(self, tensor: object) -> Entry | None:
        """The entry of a tensor if it is a bound parameter."""
        entry = self._entries.get(id(tensor))
        return entry if entry is not None and entry.parameter() is tensor else None

    def layer_of(self, weight: Tensor, bias: object = None) -> QuantizedLinear | None:
        """The layer of a linear, or None where it stays in model dtype.

        Raises:
            BackendError: when the weight is not of the bound model, or it or the bias was edited, moved or cast since.
        """
        entry = self.find(weight)
        if entry is None:
            raise BackendError(
                f"a linear was called with a weight {tuple(weight.shape)} that is not bound to a bundle, because the "
                f"compiled code is shared with another module or the weight is new: {HOW_TO_BIND}"
            )
        if entry.layer is None:
            return None
        for bound in (entry, self.find(bias)):
            if bound is not None and (tensor := bound.parameter()) is not None and bound.state != _state(tensor):
                raise BackendError(
                    f"{bound.name} was edited, moved or cast after it was bound, its integers may not belong to it any "
                    "more: quantize the model again, or bind it again when its values are the same"
                )
        self._served.add(id(entry.layer))
        return entry.layer

    def unserved(self) -> list[str]:
        """Layers that no compiled code has used so far: look here after the first calls of a model compiled in parts.

        Modules that are called outside of the compiled parts run with float weights; compile them too.
        """
        layers = [entry.layer for entry in self._entries.values() if entry.layer is not None]
        return [layer.plan.layer for layer in layers if id(layer) not in self._served]


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
