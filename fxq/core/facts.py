"""What is known of a quantized module as a whole: it hangs on the module, and manifests and receipts state it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxq.calls.conditions import Expression
from fxq.calls.rules import CallRules, Sizes
from fxq.core.ir import QuantGraph, Stage, module_note, set_module_note

Texts = Mapping[str, Sequence[str]]
"""Sentences by the layer or the module they are said of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """How a module was made and what it may be called with.

    Attributes:
        recipe: in JSON form, see :func:`fxq.recipes.recipe_to_json`.
        calibration_hash: of the calibration data; empty without.
        inputs: see :data:`fxq.calls.rules.Sizes`.
        dtypes: of the inputs, see :class:`~fxq.calls.rules.CallRules`; None in bundles that do not state them.
        conditions: on the inputs, as there; None in bundles that do not state them.
        passes: (name, nodes or layers touched) in order.
        environment: versions and machine.
        sensitivity: alpha of each chunk; None where nothing was measured.
        chunk_weights: loss weight of each chunk; None in bundles that do not state them.
        never_called: linears of the model that the captured call does not use.
        parallel: rank, size and plan of a rank's part; None of a whole module.
        stage: FROZEN, or BOUND once :func:`fxq.optimize` made it.
        remarks: what the fusion passes say of layers.
        notes: what they say of modules without a layer.
        others: facts of other writers, by name.
    """

    recipe: Mapping[str, object]
    calibration_hash: str
    inputs: Sizes
    passes: Sequence[tuple[str, int]]
    environment: Mapping[str, str]
    dtypes: Sequence[str | None] | None = None
    conditions: Sequence[Expression] | None = None
    sensitivity: Sequence[float] | None = None
    chunk_weights: Sequence[float] | None = None
    never_called: Sequence[str] = ()
    parallel: Mapping[str, object] | None = None
    stage: Stage = Stage.FROZEN
    remarks: Texts = dataclasses.field(default_factory=dict)
    notes: Texts = dataclasses.field(default_factory=dict)
    others: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, module: fx.GraphModule) -> Facts:
        """Those of a quantized module.

        Raises:
            ValueError: when fxq did not make it.
        """
        facts = module_note(module)
        if not isinstance(facts, cls):
            raise ValueError(
                f"this {type(module).__name__} was not made by fxq.quantize or fxq.load; it carries no fxq facts"
            )
        return facts

    def attach(self, module: fx.GraphModule) -> None:
        """Hang the facts on a module, in the form that JSON gives back and in the place of older ones."""
        set_module_note(module, dataclasses.replace(Facts.from_json(self.to_json()), stage=self.stage))

    @property
    def optimized(self) -> bool:
        """Whether the module is made for one device: it is run, not saved."""
        return self.stage > Stage.FROZEN

    def after(self, graph: QuantGraph) -> Facts:
        """The facts of a module whose graph went through more passes, with what they said of it."""
        passes = (*self.passes, *((name, touched) for name, touched, _ in graph.log))
        if graph.stage <= Stage.FROZEN:
            return dataclasses.replace(self, passes=passes)
        return dataclasses.replace(self, passes=passes, stage=graph.stage, remarks=graph.remarks, notes=graph.notes)

    def call_rules(self, names: Sequence[str]) -> CallRules:
        """What the module may be called with, by the names of its flat inputs.

        Raises:
            ValueError: when the facts do not describe ``names``.
        """
        return CallRules.from_json(self._stated(("inputs", "dtypes", "conditions")), names)

    def _stated(self, names: Iterable[str]) -> dict[str, object]:
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None or name == "sensitivity"}

    def to_json(self) -> dict[str, object]:
        """JSON form: what manifests and summaries show. ``remarks`` and ``notes`` are there in optimized modules."""
        optimized = ("remarks", "notes") if self.optimized else ()
        data = self._stated((*_STATED, *optimized)) | dict(self.others)
        plain: dict[str, object] = json.loads(json.dumps(data))
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Facts:
        """Inverse of :meth:`to_json` for facts that were checked (:func:`fxq.export.graph.strict.check_facts`)."""
        known = {name: value for name, value in data.items() if name in (*_STATED, "remarks", "notes")}
        stage = Stage.BOUND if "remarks" in data else Stage.FROZEN
        return cls(**known, stage=stage, others={name: value for name, value in data.items() if name not in known})


ATTENTION = "attention"
"""Name of what was chosen for attentions, among the facts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """What became of one attention.

    Attributes:
        place: the quantized layer that reads its result, else the path of its module.
        error: as :class:`~fxq.core.method.AttentionScheme` measures it; None where it was not measured.
        reason: why it is exact; empty where it is computed in integers.
    """

    place: str
    error: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenAttentions:
    """What became of every attention of a module, in the order of its graph."""

    scheme: str
    max_error: float
    layers: tuple[Chosen, ...]

    def to_json(self) -> dict[str, object]:
        """JSON form."""
        return dataclasses.asdict(self) | {"layers": [dataclasses.asdict(layer) for layer in self.layers]}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> ChosenAttentions | None:
        """Those that facts tell of, which were checked where they come from a file; None where there are none."""
        found = facts.get(ATTENTION)
        if found is None:
            return None
        layers = (Chosen(place=one["place"], error=one["error"], reason=one["reason"]) for one in found["layers"])
        return cls(scheme=found["scheme"], max_error=found["max_error"], layers=tuple(layers))

    @property
    def integers(self) -> tuple[Chosen, ...]:
        """Those computed in integers."""
        return tuple(layer for layer in self.layers if not layer.reason)

    def lines(self, kernel: str) -> list[str]:
        """Sentences for a summary: how many, with which errors, and each that is exact with its reason.

        Args:
            kernel: that runs those in integers, or "".
        """
        errors = [layer.error for layer in self.integers if layer.error is not None]
        text = f"{self.scheme} attention: {len(self.integers)} of {len(self.layers)}"
        text += f" ({kernel})" if kernel else ""
        if errors:
            text += f", error {min(errors):.2%} to {max(errors):.2%}, at most {self.max_error:.2%} allowed"
        return [text, *(f"exact attention: {layer.place}: {layer.reason}" for layer in self.layers if layer.reason)]


_STATED = (
    "recipe",
    "calibration_hash",
    "sensitivity",
    "chunk_weights",
    "never_called",
    "inputs",
    "dtypes",
    "conditions",
    "passes",
    "environment",
    "parallel",
)
"""Facts in the order in which manifests state them."""


def has_facts(module: torch.nn.Module) -> bool:
    """Whether fxq made the module: it carries facts."""
    return isinstance(module, fx.GraphModule) and module_note(module) is not None
