"""Analysis: the recipe's decision on every linear, as a scheme or as a reason why not."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxq.core.config import Recipe, RecipeError, Rule
from fxq.core.graph import linear_sites, sharing_conflicts
from fxq.core.ir import LAYER_TENSORS, LayerPlan, QuantGraph, Stage, set_plan
from fxq.core.method import refuse_format
from fxq.core.pipeline import Analysis
from fxq.numerics import MAX_WIDTH, PACK_BLOCK, unfit_width
from fxq.passes.match.roles import roles_of
from fxq.runtime.memory.residency import Residency

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class PlanLayers(Analysis):
    """Writes a :class:`~fxq.core.ir.LayerPlan` on every linear.

    Cases: 1. the weight is not a parameter of its own: kept; 2. it is no matrix: kept; 3. a rule says None: kept, with
    the rule's reason; 4. no rule matches: kept; 5. the weight is empty or of a dtype without kernels: kept; 6. it is
    shared in a way that integers cannot serve: kept; 7. the shape cannot be stored at the asked bits, or its integers
    cannot be added up or show what is not finite: kept; 8. otherwise the rule's scheme.
    """

    recipe: Recipe
    needs: ClassVar[Stage] = Stage.TRACED
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers to be quantized.

        Raises:
            RecipeError: when a pattern matches nothing, a weight or bias that is to be quantized has NaN or infinity,
                a layer's format is one that the recipe's methods do not choose numbers in, or the graph computes on
                quantized numbers already.
        """
        refuse_integers(graph.module)
        sites = list(linear_sites(graph.module))
        roles = roles_of(graph.module) if any(rule.role for rule in self.recipe.rules) else {}
        self.recipe.check_patterns((site.layer for site in sites), roles)
        planned = dataclasses.replace(self.recipe, rules=self.recipe.planned_rules)
        rules = planned.decide((site.layer for site in sites), roles)
        more = (name for transform in self.recipe.transforms for name in transform.stores)
        conflicts = sharing_conflicts(graph.module, (*LAYER_TENSORS, *more))
        chosen, residency = set(), Residency()
        for site in sites:
            weight = None if site.weight_name is None else site.weight(graph.module)
            out_features, in_features = _sizes(weight)
            plan = LayerPlan(layer=site.layer, in_features=in_features, out_features=out_features)
            rule = rules[site.layer]
            bias = None if site.weight_name is None else site.bias(graph.module)
            if reason := _unfit(weight, bias, rule, conflicts.get(site.layer, "")):
                plan = dataclasses.replace(plan, reason=reason)
            else:
                assert weight is not None and rule is not None and rule.scheme is not None
                refuse_format(site.layer, rule.scheme, self.recipe.methods)
                _refuse_unbounded(site.layer, "weights", weight)
                if bias is not None:
                    _refuse_unbounded(site.layer, "values of its bias", bias)
                residency.give_back(weight)
                plan = dataclasses.replace(plan, scheme=rule.scheme)
                chosen.add(site.layer)
            set_plan(site.node, plan)
        return len(chosen)


def refuse_integers(module: fx.GraphModule) -> None:
    """Refuse a graph that has operators of fxq.

    Raises:
        RecipeError: naming one.
    """
    for node in module.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("fxq."):
            raise RecipeError(
                f"the model is quantized already, or a part of it is: its graph has {node.target} ({node.name}); "
                "quantize the float model that it was made from"
            )


def _sizes(weight: Tensor | None) -> tuple[int, int]:
    """Outputs and inputs; a weight of one axis has one output."""
    if weight is None or not weight.ndim:
        return 0, 0
    return weight.shape[:-1].numel(), weight.shape[-1]


def _unfit(weight: Tensor | None, bias: Tensor | None, rule: Rule | None, conflict: str) -> str:
    """Why a linear is kept, or ""."""
    if weight is None:
        return "its weight or bias is computed in the graph, not a parameter"
    if rule is None:
        return "no rule of the recipe matches"
    if rule.scheme is None:
        return rule.reason or f"kept by rule {rule.pattern!r}"
    if weight.ndim != 2:
        return f"its weight has {weight.ndim} {'axis' if weight.ndim == 1 else 'axes'}, a quantized linear's has 2"
    if not weight.numel():
        return "its weight is empty"
    if weight.dtype not in _FLOATS:
        return f"its weight is {weight.dtype}, which no kernel computes with"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"its bias has shape {list(bias.shape)}, expected [{weight.shape[0]}]"
    in_features = weight.shape[1]
    if conflict:
        return conflict
    if rule.scheme.is_float8:
        return "" if in_features <= MAX_WIDTH else f"{in_features} input channels: a bundle holds at most {MAX_WIDTH}"
    if reason := unfit_width(in_features, rule.scheme.per_token, rule.scheme.asymmetric):
        return reason
    if rule.scheme.weight_bits == 4 and in_features % PACK_BLOCK:
        block = "a group of weights" if rule.scheme.weight_group else "the int4 packing block"
        return f"in_features {in_features} is not a multiple of {PACK_BLOCK}, {block}"
    return ""


def _refuse_unbounded(layer: str, what: str, tensor: Tensor) -> None:
    finite = tensor.isfinite() if tensor.dtype != torch.float64 else tensor.float().isfinite()
    if not bool(finite.all()):
        raise RecipeError(
            f"layer {layer}: {int((~finite).sum())} of {tensor.numel()} {what} are NaN or infinite; repair the "
            "checkpoint or exclude the layer by a rule with scheme None"
        )
