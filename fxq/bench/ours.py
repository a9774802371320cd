"""This library as a contestant: quantize, optimize, and compare every operator with its reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxq import kernels
from fxq.bench.contest import Built
from fxq.calibration.rollout import Rollout
from fxq.core.config import Recipe, Scheme
from fxq.core.signature import flatten_call
from fxq.core.summary import summary
from fxq.integrations.binding import bind
from fxq.kernels import native
from fxq.optimize import optimize
from fxq.passes.methods.ranges import MinMax
from fxq.presets import wan_recipe
from fxq.quantize import quantize


def speed_recipe(dual_scale: bool, per_token: bool = False, weight_bits: int = 8) -> Recipe:
    """W8A8, or fewer bits, by ranges alone: speed does not depend on how well the integers are chosen."""
    scheme = Scheme(weight_bits=weight_bits, input_bits=8, dual_scale=dual_scale, per_token=per_token)
    name = f"w{weight_bits}a8 {'dual' if dual_scale else 'single'} scale{' per token' if per_token else ''}"
    return wan_recipe(name, scheme, methods=(MinMax(),), weighting="uniform")


class _Comparing(fx.Interpreter):
    """Runs a graph and compares each operator of this library with its reference on the same arguments."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.ops = {op.definition: op for op in kernels.OPS}
        self.worst: dict[str, float] = {}
        self.refusal = ""

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.op == "call_function" and n.target in self.ops:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._compare(n, args, result)
        return result

    def _compare(self, node: fx.Node, args: Sequence[object], result: Tensor | tuple[Tensor, ...]) -> None:
        op = self.ops[node.target]  # type: ignore[index]
        pairs = zip(pytree.tree_leaves(op.reference(*args)), pytree.tree_leaves(result), strict=True)
        error = max(relative_error(expected, found) for expected, found in pairs)
        self.worst[op.name] = max(error, self.worst.get(op.name, 0.0))
        if not error <= op.max_error and not self.refusal:
            self.refusal = (
                f"fxq::{op.name} at {node.name} differs from its reference by {error:.2g} of the largest value, "
                f"allowed {op.max_error:.2g}"
            )


def relative_error(expected: Tensor, result: Tensor) -> float:
    """Largest difference over the largest expected value; integers that differ at all do so by at least 1 / 128."""
    if not expected.numel():
        return 0.0
    difference = (expected.float() - result.float()).abs().max()
    return float(difference) / max(float(expected.float().abs().max()), 1e-30)


def compare_operators(module: fx.GraphModule, *args: object) -> tuple[str, dict[str, float]]:
    """Run a module once and compare its operators with their references.

    Returns:
        Which operator left its ``max_error`` ("" if none), and the largest relative error by operator.
    """
    comparing = _Comparing(module)
    comparing.run(*flatten_call(module, args, {}), enable_io_processing=False)
    return comparing.refusal, comparing.worst


def kernel_facts(module: fx.GraphModule, device: str) -> dict[str, object]:
    """Nodes and kernel by operator, the kernel of each layer as the summary says it, and what fusion did."""
    names = {op.definition: op.name for op in kernels.OPS}
    counts: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.target in names:
            counts[names[node.target]] = counts.get(names[node.target], 0) + 1
    data = json.loads(summary(module).to_json())
    return {
        "operators": {name: {"nodes": n, "kernel": kernels.used(name, device)} for name, n in counts.items()},
        "layers": {row["layer"]: row["kernel"] or f"kept: {row['reason']}" for row in data["layers"]},
        "outliers": {row["layer"]: row["outliers"] for row in data["layers"] if row["quantized"]},
        "native": native.why_not() or native.name(),
        "remarks": data["facts"].get("remarks", {}),
    }


def kernel_text(facts: dict[str, Any]) -> str:
    """Kernels that run the linears, and the operators around them, in a few words."""
    linears = sorted({text for text in facts["layers"].values() if not text.startswith("kept: ")})
    return f"{', '.join(linears)}; " + ", ".join(f"{n['nodes']} {name}" for name, n in facts["operators"].items())


def optimized(
    model: nn.Module, data: list[object] | Rollout, recipe: Recipe, dynamic_shapes: object = None
) -> fx.GraphModule:
    """The model quantized on ``data`` and optimized for its device."""
    quantized = quantize(model, data, recipe, dynamic_shapes=dynamic_shapes, progress=False)
    return optimize(quantized, floats_where_faster=False)  # floats are a contestant of their own


def build(model: nn.Module, args: tuple[object, ...], recipe: Recipe, device: str) -> Built:
    """Quantize a model on its own arguments and check every operator on them."""
    module = optimized(model, [args], recipe, dynamic_shapes=(None,) * len(args))
    return finish(module, args, device, lambda: module(*args))


def through_backend(model: nn.Module, args: tuple[object, ...]) -> Built:
    """``torch.compile(backend="fxq")`` with a dual-scale quantization of the model bound to it."""
    from fxq.integrations.torch_compile import fxq_backend  # imports inductor

    quantized = quantize(model, [args], speed_recipe(dual_scale=True), progress=False)
    options: dict[str, Any] = {"fxq.recipe": bind(model, quantized)}
    compiled = torch.compile(model, backend=fxq_backend, options=options)
    # Freezing would turn the weights, by which the backend finds its layers, into constants.
    with torch._inductor.config.patch(freezing=False), torch.no_grad():
        compiled(*args)
    return Built(lambda: compiled(*args), "integer operators, inductor for the rest")


def finish(
    module: fx.GraphModule, args: tuple[object, ...], device: str, call: Callable[[], Any], **more: Any
) -> Built:
    """A contestant from an optimized module; ``args`` are those its operators are checked with."""
    with torch.no_grad():
        refusal, worst = compare_operators(module, *args)
    facts = {**kernel_facts(module, device), "largest_error": worst}
    return Built(call, kernel_text(facts), refusal=refusal, facts=facts, **more)
