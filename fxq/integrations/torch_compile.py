"""The ``torch.compile`` backend: calibrated linears become integer operators, inductor compiles the rest.

Dynamo shows weights as inputs of a graph, and blocks of one shape share one compiled graph. Therefore the integers are
inputs too, chosen at every call by the identity of the float weight that is passed; see docs/compile.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxq.core.config import plain_layer
from fxq.integrations.binding import HOW_TO_BIND, BackendError, Binding
from fxq.integrations.dynamo_graph import (
    Layers,
    Site,
    check_readers,
    copy_graph,
    fake_inputs,
    find_sites,
    operands,
    replace,
    shared_inputs,
    source_name,
)
from fxq.integrations.swap import Bundle, check_weight, read_layers
from fxq.runtime.messages import did_you_mean

RECIPE = "fxq.recipe"


def _bind_by_name(gm: fx.GraphModule, inputs: Sequence[Any], sites: Sequence[Site], bundle: Bundle) -> Binding:
    """Bind the parameters of a graph by the names that Dynamo gives them; right when the whole model is compiled."""
    layers, kept = read_layers(bundle)
    layers, kept = {plain_layer(name): layer for name, layer in layers.items()}, {plain_layer(name) for name in kept}
    binding, weights = Binding(), {site.weight for site in sites}
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if not isinstance(inputs[i], nn.Parameter):
            continue
        name = plain_layer(source_name(node))
        layer = layers.get(name.removesuffix(".weight"), layers.get(name))
        if layer is not None:
            check_weight(layer, inputs[i])
        elif i in weights and name.removesuffix(".weight") not in kept:
            raise BackendError(f"the bundle does not know the linear with the weight {name!r}: {HOW_TO_BIND}")
        binding.add(name, inputs[i], layer)
    return binding


class _Compiled:
    """A Dynamo graph, compiled once for every kind of layers that it is called with."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[Site], binding: Binding, patches: dict[str, object]) -> None:
        self.gm, self.sites, self.binding, self.patches = copy_graph(gm), sites, binding, patches
        self.fake_mode = TracingContext.get().fake_mode
        self.variants: dict[object, Callable[..., object]] = {}
        self.seen: dict[tuple[int, ...], tuple[Callable[..., object], list[Tensor]]] = {}

    def __call__(self, *args: object) -> object:
        compiled, extra = self.prepare(args)
        return compiled(*args, *extra)

    def prepare(self, args: Sequence[Any]) -> tuple[Callable[..., object], list[Tensor]]:
        """What runs for these inputs, and the integers that it needs besides."""
        linears = [(args[site.weight], None if site.bias is None else args[site.bias]) for site in self.sites]
        layers = self.binding.layers_of(linears)
        key = tuple(map(id, layers))
        if key not in self.seen:
            self.seen[key] = self.variant(layers), operands(layers)
        return self.seen[key]

    def variant(self, layers: Layers) -> Callable[..., object]:
        """The compiled graph for layers of this kind."""
        shared = shared_inputs(self.gm, self.sites, layers)
        kind = (tuple(None if layer is None else layer.kind for layer in layers), tuple(shared))
        if kind not in self.variants:
            self.variants[kind] = self.build(layers, shared)
        return self.variants[kind]

    def build(self, layers: Layers, shared: Sequence[int]) -> Callable[..., object]:
        """Compile with the fake inputs of the capture: sizes that are dynamic stay so, also in a later call."""
        mode = self.fake_mode
        assert mode is not None and mode.shape_env is not None
        gm = copy_graph(self.gm)
        extra = [mode.from_tensor(tensor, static_shapes=True) for tensor in operands(layers)]
        replace(gm, self.sites, layers, shared, extra)
        with _context(mode):
            compiled: Callable[..., object] = compile_fx(gm, fake_inputs(gm), config_patches=self.patches)  # type: ignore[assignment]
        return compiled


@contextlib.contextmanager
def _context(mode: FakeTensorMode) -> Iterator[None]:
    """Dynamo's own tracing context while it compiles; later one with the same symbols, which may not get new guards.

    Raises:
        BackendError: when the sizes that the graph accepts would be narrowed after Dynamo has compiled it.
    """
    if TracingContext.try_get() is not None:
        yield
        return
    assert mode.shape_env is not None
    guards = len(mode.shape_env.guards)
    with tracing(TracingContext(mode)):
        yield
    if len(mode.shape_env.guards) > guards:
        raise BackendError(
            "layers of modules that share compiled code need different input sizes; compile with dynamic=False, or "
            "each of the modules on its own after torch.compiler.reset()"
        )


def _parse(options: Mapping[str, object] | None) -> tuple[Any, dict[str, object]]:
    """The recipe and the inductor options.

    Raises:
        BackendError: naming an unknown option and the close match, or the missing recipe.
    """
    given = dict(options or {})
    recipe = given.pop(RECIPE, None)
    known = [RECIPE, *torch._inductor.list_options()]
    for name in given:
        if name.replace("-", "_") not in known:
            hint = did_you_mean(name, known, 0.6) or f"it knows {RECIPE!r} and the options of inductor"
            raise BackendError(f"backend fxq has no option {name!r}; {hint}")
    if recipe is None:
        raise BackendError(
            "backend fxq runs calibrated models only: quantize the model with fxq.quantize, save it with fxq.save, and "
            f'pass options={{"{RECIPE}": folder}}'
        )
    return recipe, {name.replace("-", "_"): value for name, value in given.items()}


def fxq_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with the integers of a bundle; ``torch.compile(model, backend="fxq", options=...)``.

    Args:
        gm: the graph.
        example_inputs: its inputs; parameters are the model's own.
        options: ``"fxq.recipe"`` is a bundle's folder, a module of :func:`fxq.quantize`, or what :func:`fxq.bind`
            returns; the rest are options of inductor.
        mode: of ``torch.compile``; give options instead.

    Returns:
        The compiled function.

    Raises:
        BackendError: unknown options, no bundle, a linear that the bundle does not know, a weight with other readers.
        ApplyError: when the weights do not fit the bundle.
    """
    if mode is not None:
        raise BackendError(f"backend fxq takes options, not mode={mode!r}: see torch._inductor.list_mode_options()")
    recipe, patches = _parse(options)
    sites = find_sites(gm, example_inputs)
    binding = recipe if isinstance(recipe, Binding) else _bind_by_name(gm, example_inputs, sites, recipe)
    check_readers(gm, example_inputs, binding)
    compiled = _Compiled(gm, sites, binding, patches)
    compiled.prepare(example_inputs)
    return compiled
