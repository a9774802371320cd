"""The graph with its stage, and the note on each linear. Only this file reads or writes node notes."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxq.calls.captured import CapturedModule, catch_up, inherit_notes, notes_of
from fxq.core.method import LayerStatistics, LayerUpdate, Scheme
from fxq.runtime.exclusive import exclusive
from fxq.runtime.workers import Workers

_KEY = "fxq"

LAYER_TENSORS = ("weight", "weight_scale", "input_scale", "input_zero_point", "offset", "perm")
"""What a quantized layer may store under its name; which of them it does says :func:`stored_names`."""


class Stage(enum.IntEnum):
    """How far a graph is along the straight line."""

    TRACED = 0
    PLANNED = 1
    CALIBRATED = 2
    LOWERED = 3
    FROZEN = 4
    FUSED = 5
    BOUND = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What is to be done, or was done, with one linear.

    ``layer`` is the user's module path; ``scheme`` None means the layer stays in model dtype for ``reason``, which of a
    quantized one says why a budget gave it its bits. ``outliers`` are input channels with their own scale, ascending.
    ``output_sqnr`` in dB is measured on calibration rows once the integers are chosen. ``bias_deviation`` is how far
    methods shifted the bias, root mean square in units of the output; None: not at all. ``transform`` names what the
    graph does to the layer's input or adds to its output (:mod:`fxq.passes.transforms`): without it the integers are
    of no use.
    """

    layer: str
    in_features: int
    out_features: int
    scheme: Scheme | None = None
    reason: str = ""
    outliers: tuple[int, ...] = ()
    outlier_reason: str = ""
    output_sqnr: float | None = None
    bias_deviation: float | None = None
    transform: str = ""

    @property
    def split(self) -> int:
        """Number of normal input channels."""
        return self.in_features - len(self.outliers)

    @property
    def quantization(self) -> Scheme:
        """The scheme of a layer that is quantized.

        Raises:
            ValueError: when the layer is kept in model dtype.
        """
        if self.scheme is None:
            raise ValueError(f"layer {self.layer} is kept in model dtype: {self.reason or 'no scheme is planned'}")
        return self.scheme

    def to_json(self) -> dict[str, object]:
        """JSON form; what lies on the node. It keeps the form it had before what is not used here existed."""
        data = dataclasses.asdict(self) | {"outliers": list(self.outliers)}
        for name in ("bias_deviation", "transform"):
            if data[name] in (None, ""):
                del data[name]
        if self.scheme is not None:
            for name in ("per_token", "asymmetric", "format", "weight_group"):
                if getattr(self.scheme, name) == getattr(Scheme, name):
                    del data["scheme"][name]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerPlan:
        """Inverse of :meth:`to_json`.

        Raises:
            TypeError: on unknown or missing fields, or a layer that is no name.
        """
        scheme = data["scheme"]
        if not isinstance(data["layer"], str):
            raise TypeError(f"the layer of a plan is {type(data['layer']).__name__}, expected a name")
        return cls(
            **{
                **data,
                "scheme": None if scheme is None else Scheme(**scheme),
                "outliers": tuple(data["outliers"]),
            }
        )


def stored_names(plan: LayerPlan) -> tuple[str, ...]:
    """Those of :data:`LAYER_TENSORS` that a quantized layer stores.

    ``perm`` only with outliers, ``input_scale`` and ``input_zero_point`` only when inputs are not scaled per token, the
    latter for integers alone.
    """
    absent = {"input_scale", "input_zero_point"} if plan.quantization.per_token else set[str]()
    absent |= {"input_zero_point"} if plan.quantization.is_float8 else set[str]()
    return tuple(name for name in LAYER_TENSORS if name not in absent | (set() if plan.outliers else {"perm"}))


class _PlanNote(dict[str, Any]):
    """A plan in JSON form, as exporters of torch carry and write it, with the plan itself: it is parsed once."""

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(plan.to_json())
        self.plan = plan


def plan_of(node: fx.Node) -> LayerPlan | None:
    """The node's plan, or None."""
    note = (node.meta.get("custom") or {}).get(_KEY)
    if note is not None and not isinstance(note, _PlanNote):
        set_plan(node, LayerPlan.from_json(note))
        return plan_of(node)
    return None if note is None else note.plan


def set_plan(node: fx.Node, plan: LayerPlan) -> None:
    """Write or replace the node's plan."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), _KEY: _PlanNote(plan)}


def clear_plan(node: fx.Node) -> None:
    """Remove the plan of a node that is about to be replaced."""
    custom = dict(node.meta.get("custom") or {})
    custom.pop(_KEY, None)
    node.meta["custom"] = custom


def inherit_meta(new: fx.Node, old: fx.Node, value: object) -> None:
    """Give a new node the origin of the node it replaces; ``value`` is its example (fake) value."""
    for key in ("nn_module_stack", "stack_trace", "torch_fn"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    new.meta["val"] = value


def module_path(node: fx.Node) -> str:
    """Path of the user's module whose forward made the node; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]).removeprefix("L['self'].") if stack else ""


def example_value(node: fx.Node) -> Any:
    """The fake value recorded when the node was traced, or None; of a loaded graph, made when it is asked for."""
    if "val" not in node.meta and node.graph.owning_module is not None:
        catch_up(node.graph.owning_module)
    return node.meta.get("val")


def compiled_value(node: fx.Node) -> Any:
    """The fake value that Dynamo recorded, or else :func:`example_value`."""
    return node.meta.get("example_value", example_value(node))


def set_compiled_input(node: fx.Node, value: object) -> None:
    """Note the fake value of an input added to a graph of Dynamo, as of a tensor that stays where it is."""
    node.meta.update(example_value=value, tensor_dict={"_dynamo_static_input_type": "unguarded"})


def forget_origin(module: fx.GraphModule) -> None:
    """Remove what names the files of this machine, and the module's own notes."""
    for node in module.graph.nodes:
        for key in ("stack_trace", "from_node"):
            node.meta.pop(key, None)
    module.meta.clear()


def planned(module: fx.GraphModule) -> dict[str, tuple[LayerPlan, list[fx.Node]]]:
    """Plans by layer with the nodes that carry them, in graph order."""
    found: dict[str, tuple[LayerPlan, list[fx.Node]]] = {}
    for node in module.graph.nodes:
        if (plan := plan_of(node)) is not None:
            found.setdefault(plan.layer, (plan, []))[1].append(node)
    return found


class ModuleNote(Protocol):
    """What is noted on a module as a whole; :class:`fxq.core.facts.Facts` are."""

    @property
    def stage(self) -> Stage:
        """Of the module's graph."""


def module_note(module: fx.GraphModule) -> ModuleNote | None:
    """What fxq noted on the module, or None."""
    note: ModuleNote | None = notes_of(module).get(_KEY)
    return note


def set_module_note(module: fx.GraphModule, note: ModuleNote) -> None:
    """Note something on the module, in the place of what was noted before."""
    module.meta[_KEY] = note


@dataclasses.dataclass
class QuantGraph:
    """A graph on its way along the line.

    ``statistics`` and ``updates`` map layer names to what calibration saw and what methods chose; ``chunk_weights``
    float32 [chunks] is the loss weight of each chunk (mean 1); ``log`` lists (pass, nodes touched, seconds);
    ``remarks`` tell per layer what the fusion passes did with it, or why they could not; ``notes`` tell the same of
    modules without a layer; ``found`` is what analyses found of the whole, in JSON form for the module's facts.
    ``workers`` are the ranks that each have such a graph: what a pass chooses on one of them it shares.
    """

    module: fx.GraphModule
    stage: Stage = Stage.TRACED
    statistics: dict[str, LayerStatistics] = dataclasses.field(default_factory=dict)
    updates: dict[str, LayerUpdate] = dataclasses.field(default_factory=dict)
    chunk_weights: Tensor = dataclasses.field(default_factory=lambda: torch.ones(1, dtype=torch.float32, device="cpu"))
    log: list[tuple[str, int, float]] = dataclasses.field(default_factory=list)
    remarks: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    notes: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    found: dict[str, object] = dataclasses.field(default_factory=dict)
    workers: Workers = dataclasses.field(default_factory=Workers)
    _layers: frozenset[str] = dataclasses.field(default=frozenset(), init=False, repr=False)

    @classmethod
    def of(cls, module: fx.GraphModule) -> QuantGraph:
        """The graph of a module that fxq made, at its stage; of any other, a TRACED one."""
        note = module_note(module)
        return cls(module, Stage.TRACED if note is None else note.stage)

    def remark(self, layer: str, text: str) -> None:
        """Add a sentence about a layer for the report.

        Raises:
            ValueError: when no linear of that name has a plan: no row of the summary would show the sentence.
        """
        if not self._known(layer):
            raise ValueError(f"{layer!r} is no planned layer, so no row of the summary can say {text!r}; use note()")
        self.remarks.setdefault(layer, []).append(text)

    def note(self, place: str, text: str) -> None:
        """Add a sentence about a layer, or about a module's path, which the summary shows below its rows."""
        if self._known(place):
            self.remark(place, text)
        else:
            self.notes.setdefault(place, []).append(text)

    def _known(self, layer: str) -> bool:
        if layer not in self._layers:
            self._layers = frozenset(self.plans)
        return layer in self._layers

    @property
    def plans(self) -> dict[str, LayerPlan]:
        """Plan of every linear, in graph order."""
        return {layer: plan for layer, (plan, _) in planned(self.module).items()}

    def owners(self, groups: Iterable[Iterable[LayerPlan]]) -> list[int]:
        """The rank that works on each group of layers, such that the numbers of weights are spread evenly."""
        return self.workers.owners(
            [float(sum(plan.in_features * plan.out_features for plan in group)) for group in groups]
        )

    @property
    def quantized_plans(self) -> dict[str, LayerPlan]:
        """Plans of the linears that are to be quantized."""
        return {layer: plan for layer, plan in self.plans.items() if plan.scheme is not None}

    def adopt(self, statistics: dict[str, LayerStatistics]) -> None:
        """Take statistics collected on another fork of the same traced model; the graph becomes CALIBRATED."""
        self.statistics = dict(statistics)
        self.stage = Stage.CALIBRATED

    @exclusive
    def fork(self) -> QuantGraph:
        """A copy whose graph can be rewritten on its own; tensors are shared."""
        root = torch.nn.Module()
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.module.graph, values)
        graph.output(output)
        graph._codegen = self.module.graph._codegen
        for node in graph.nodes:
            if node.op == "get_attr":
                put_tensor(root, str(node.target), get_tensor(self.module, str(node.target)))
        module = CapturedModule(root, graph, self.module.__class__.__name__)
        inherit_notes(module, notes_of(self.module))
        return QuantGraph(
            module,
            self.stage,
            dict(self.statistics),
            dict(self.updates),
            self.chunk_weights,
            list(self.log),
            {layer: list(texts) for layer, texts in self.remarks.items()},
            {place: list(texts) for place, texts in self.notes.items()},
            dict(self.found),
            self.workers,
        )


def put_tensor(module: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Register ``tensor`` under a dotted name, making the modules on the way; replaces what was there.

    A tensor that stands where a module is needed goes too: the integers of a parameter ``w1`` lie under ``w1.weight``.
    """
    *path, leaf = name.split(".")
    for part in path:
        if not isinstance(getattr(module, part, None), torch.nn.Module):
            drop_tensor(module, part)
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    drop_tensor(module, leaf)
    if isinstance(tensor, torch.nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def drop_tensor(module: torch.nn.Module, name: str) -> None:
    """Remove a parameter, buffer or plain tensor attribute if present; ``name`` may be dotted."""
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    if hasattr(module, leaf):
        delattr(module, leaf)


def get_tensor(module: torch.nn.Module, name: str) -> Tensor:
    """The tensor registered under a dotted name."""
    value: object = module
    for part in name.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor")
    return value
