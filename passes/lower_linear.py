"""Rewrite: a planned linear becomes quantize + dual-scale GEMM on integers or float8."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from fxq import numerics
from fxq.core.graph import LinearSite, arguments, drop_unread_attributes, linear_sites
from fxq.core.ir import (
    LayerPlan,
    QuantGraph,
    Stage,
    clear_plan,
    example_value,
    inherit_meta,
    plan_of,
    put_tensor,
    set_plan,
)
from fxq.core.layer import Operators
from fxq.core.method import LayerUpdate
from fxq.core.pipeline import Rewrite
from fxq.passes.apply_methods import group_order
from fxq.runtime.memory.residency import give_back


class LoweringError(RuntimeError):
    """A planned layer that no op can run."""


@dataclasses.dataclass(frozen=True)
class LowerLinear(Rewrite):
    """Replaces every planned linear by ``fxq::quantize_act`` and ``fxq::dual_scale_linear``.

    Integers stay one per byte here; :class:`~fxq.passes.freeze.Freeze` packs them. Tensors are registered under the
    layer's name: ``weight_int`` [N, K], ``weight_scale`` [G, N], ``input_scale`` [G], ``input_zero_point`` [G],
    ``offset`` [N] and, for dual-scale layers, ``perm`` [K].

    Layers whose scheme is per token become ``fxq::quantize_per_token``, or ``fxq::quantize_per_token_asymmetric``, and
    ``fxq::dual_scale_linear_per_token`` instead: their input scales and zero points are a result of the first and not
    stored, and ``offset`` is the bias. Those of format float8 become the float8 operators
    (:mod:`fxq.kernels.float8`), without zero points.
    """

    needs: ClassVar[Stage] = Stage.CALIBRATED
    gives: ClassVar[Stage] = Stage.LOWERED

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of linears replaced."""
        stored: dict[str, dict[str, Tensor]] = {}
        plans: dict[str, LayerPlan] = {}
        count = 0
        for site in list(linear_sites(graph.module)):
            plan = plan_of(site.node)
            if plan is None or plan.scheme is None:
                continue
            if plan.layer not in stored:
                update = graph.updates[plan.layer]
                plans[plan.layer] = _with_deviation(plan, update)
                stored[plan.layer] = self._tensors(graph.module, site, plan, update)
            self._replace(graph.module, site, plans[plan.layer])
            count += 1
        drop_unread_attributes(graph.module.graph)
        # Only now is the float weight unread: its name may be needed.
        for layer, tensors in stored.items():
            for name, tensor in tensors.items():
                put_tensor(graph.module, f"{layer}.{name}", tensor)
        return count

    def _tensors(
        self, module: fx.GraphModule, site: LinearSite, plan: LayerPlan, update: LayerUpdate
    ) -> dict[str, Tensor]:
        if not plan.quantization.is_float8:
            _check_range(plan, update)
        bias = site.bias(module)
        bias = None if bias is None else bias.to(update.weight.device)
        if update.bias_shift is not None:
            bias = update.bias_shift if bias is None else bias.float() + update.bias_shift
        tensors: dict[str, Tensor] = {"weight_int": update.weight, "weight_scale": update.weight_scale}
        if update.input_scale is not None:
            tensors["input_scale"] = update.input_scale
        if update.input_scale is None or update.input_zero_point is None:
            zeros = torch.zeros(plan.out_features, dtype=torch.float32, device="cpu")
            tensors["offset"] = zeros if bias is None else bias.float().clone()
        else:
            scales = (update.weight_scale, update.input_scale, update.input_zero_point)
            tensors["input_zero_point"] = update.input_zero_point
            tensors["offset"] = numerics.fold_offset(bias, update.weight, *scales, plan.split)
            give_back(update.weight)
        if plan.outliers:
            tensors["perm"] = group_order(plan).to(torch.int32)
        device = site.weight(module).device
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def _replace(self, module: fx.GraphModule, site: LinearSite, plan: LayerPlan) -> None:
        old = site.node
        graph, value = module.graph, example_value(old)
        dtype = site.weight(module).dtype if value is None else value.dtype
        with graph.inserting_before(old):
            x = arguments(old)["input"]
            x = _cast(graph, old, x, torch.float32) if dtype == torch.float64 else x
            computed = torch.float32 if dtype == torch.float64 else dtype
            y = (_per_token if plan.quantization.per_token else _static)(graph, old, x, plan, computed)
            same = value is None or computed == dtype
            inherit_meta(y, old, value if same else value.new_empty(value.shape, dtype=computed))
            result = y if computed == dtype else _cast(graph, old, y, dtype)
        set_plan(y, plan)
        clear_plan(old)
        old.replace_all_uses_with(result)
        graph.erase_node(old)


def _with_deviation(plan: LayerPlan, update: LayerUpdate) -> LayerPlan:
    """The plan with how far methods shifted the bias, by which the model's own is known again."""
    if update.bias_shift is None:
        return plan
    return dataclasses.replace(plan, bias_deviation=float(update.bias_shift.double().square().mean().sqrt()))


def _cast(graph: fx.Graph, old: fx.Node, x: Any, dtype: torch.dtype) -> fx.Node:
    """A value in another dtype: no operator computes in float64."""
    node = graph.call_function(torch.ops.aten.to.dtype, (x, dtype))
    value = example_value(x)
    inherit_meta(node, old, None if value is None else value.new_empty(value.shape, dtype=dtype))
    return node


def _check_range(plan: LayerPlan, update: LayerUpdate) -> None:
    """Refuse integers that could overflow an int32 accumulator; groups with scales per token have one each."""
    if plan.in_features > (numerics.MAX_WIDTH_ASYMMETRIC if plan.quantization.asymmetric else numerics.MAX_WIDTH):
        raise LoweringError(
            f"layer {plan.layer}: {plan.in_features} inputs can overflow the int32 accumulator; exclude it by a rule"
        )
    if plan.outliers and update.input_scale is not None:
        scale = update.input_scale[:, None].double() * update.weight_scale.double()
        ratio = float((scale[1] / scale[0]).max())
        limit = numerics.ratio_limit(plan.in_features, plan.split)
        if not ratio <= limit:
            raise LoweringError(
                f"layer {plan.layer}: outlier scales are {ratio:.3g} times the normal ones, at most {limit:.3g} "
                "fits the int32 accumulator; set dual_scale to false for it"
            )


def _get(graph: fx.Graph, old: fx.Node, plan: LayerPlan, name: str) -> fx.Node:
    node = graph.create_node("get_attr", f"{plan.layer}.{name}")
    inherit_meta(node, old, None)
    return node


def _static(graph: fx.Graph, old: fx.Node, x: Argument, plan: LayerPlan, dtype: torch.dtype) -> fx.Node:
    """The operators in the place of a linear whose input scales are stored."""
    assert isinstance(x, fx.Node)
    operators, scheme = Operators.of(plan.quantization), plan.quantization
    perm = _get(graph, old, plan, "perm") if plan.outliers else None
    scale = _get(graph, old, plan, "input_scale")
    zero = () if scheme.is_float8 else (_get(graph, old, plan, "input_zero_point"),)
    input_bits, bits = ((), ()) if scheme.is_float8 else ((scheme.input_bits,), (8,))
    q = graph.call_function(operators.quantize.definition, (x, perm, scale, *zero, plan.split, *input_bits))
    value = example_value(x)
    inherit_meta(q, old, None if value is None else value.new_empty(value.shape, dtype=scheme.input_dtype))
    weight, weight_scale, offset = (_get(graph, old, plan, n) for n in ("weight_int", "weight_scale", "offset"))
    return graph.call_function(
        operators.product.definition, (q, weight, weight_scale, scale, offset, plan.split, *bits, dtype)
    )


def _per_token(graph: fx.Graph, old: fx.Node, x: Argument, plan: LayerPlan, dtype: torch.dtype) -> fx.Node:
    """The operators in the place of a linear whose input scales are measured per token, or its zero points too."""
    assert isinstance(x, fx.Node)
    perm = _get(graph, old, plan, "perm") if plan.outliers else None
    operators, scheme = Operators.of(plan.quantization), plan.quantization
    input_bits, bits = ((), ()) if scheme.is_float8 else ((scheme.input_bits,), (8,))
    pair = graph.call_function(operators.quantize.definition, (x, perm, plan.split, *input_bits))
    q, scale = (graph.call_function(operator.getitem, (pair, i)) for i in range(2))
    if (value := example_value(x)) is not None:
        columns = (2 if plan.outliers else 1) * (2 if scheme.asymmetric else 1)
        integers = value.new_empty(value.shape, dtype=scheme.input_dtype)
        scales = value.new_empty((*value.shape[:-1], columns), dtype=torch.float32)
    else:
        integers = scales = None
    for node, made in ((pair, (integers, scales)), (q, integers), (scale, scales)):
        inherit_meta(node, old, None if value is None else made)
    weight, weight_scale, offset = (_get(graph, old, plan, n) for n in ("weight_int", "weight_scale", "offset"))
    return graph.call_function(
        operators.product.definition, (q, scale, weight, weight_scale, offset, plan.split, *bits, dtype)
    )
