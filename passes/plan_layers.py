"""Analysis: the recipe's decision on every linear, as a scheme or as a reason why not."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fxq.config import Recipe, RecipeError
from fxq.graph import linear_sites, sharing_conflicts
from fxq.ir import LAYER_TENSORS, LayerPlan, QuantGraph, Stage, set_plan
from fxq.numerics import PACK_BLOCK, unfit_width
from fxq.pipeline import Analysis
from fxq.residency import Residency


@dataclasses.dataclass(frozen=True)
class PlanLayers(Analysis):
    """Writes a :class:`~fxq.ir.LayerPlan` on every linear.

    Cases: 1. the weight is not a parameter of its own: kept; 2. a rule says None: kept, with the rule's reason; 3. no
    rule matches: kept; 4. the weight is empty: kept; 5. it is shared in a way that integers cannot serve: kept; 6. the
    shape cannot be stored at the asked bits, or its integers cannot be added up or show what is not finite: kept; 7.
    otherwise the rule's scheme.
    """

    recipe: Recipe
    needs: ClassVar[Stage] = Stage.TRACED
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers to be quantized.

        Raises:
            RecipeError: when a pattern matches nothing, or a weight that is to be quantized has NaN or infinity.
        """
        sites = list(linear_sites(graph.module))
        self.recipe.check_patterns(site.layer for site in sites)
        conflicts = sharing_conflicts(graph.module, LAYER_TENSORS)
        chosen, residency = set(), Residency()
        for site in sites:
            out_features, in_features = (0, 0) if site.weight_name is None else site.weight(graph.module).shape
            plan = LayerPlan(layer=site.layer, in_features=in_features, out_features=out_features)
            rule = self.recipe.rule_for(site.layer)
            if site.weight_name is None:
                plan = dataclasses.replace(plan, reason="its weight or bias is computed in the graph, not a parameter")
            elif rule is None:
                plan = dataclasses.replace(plan, reason="no rule of the recipe matches")
            elif rule.scheme is None:
                plan = dataclasses.replace(plan, reason=rule.reason or f"kept by rule {rule.pattern!r}")
            elif not out_features * in_features:
                plan = dataclasses.replace(plan, reason="its weight is empty")
            elif site.layer in conflicts:
                plan = dataclasses.replace(plan, reason=conflicts[site.layer])
            elif rule.scheme.weight_bits == 4 and in_features % PACK_BLOCK:
                reason = f"in_features {in_features} is not a multiple of {PACK_BLOCK}, the int4 packing block"
                plan = dataclasses.replace(plan, reason=reason)
            elif reason := unfit_width(in_features, rule.scheme.per_token):
                plan = dataclasses.replace(plan, reason=reason)
            else:
                weight = site.weight(graph.module)
                if not bool(weight.isfinite().all()):
                    bad = int((~weight.isfinite()).sum())
                    raise RecipeError(
                        f"layer {site.layer}: {bad} of {weight.numel()} weights are NaN or infinite; repair the "
                        "checkpoint or exclude the layer by a rule with scheme None"
                    )
                residency.give_back(weight)
                plan = dataclasses.replace(plan, scheme=rule.scheme)
                chosen.add(site.layer)
            set_plan(site.node, plan)
        return len(chosen)
