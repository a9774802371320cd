"""Every quantized layer of a model against F.linear at the rows the model really gives it: where int8 loses."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxq import kernels, numerics
from fxq.bench.cases import LEAST_SQNR
from fxq.bench.contest import BF16, FP32, Built, Case, CaseResult, Contestant
from fxq.bench.floats import own_dtype
from fxq.calibration.rollout import Rollout
from fxq.core.ir import LayerPlan, planned
from fxq.core.layer import LayerTensors, Operators, quantized_layers
from fxq.core.signature import flatten_call
from fxq.dtypes import dtype_name
from fxq.kernels import float8, native
from fxq.kernels.gemm.panels import pack_panels

OURS = "fxq"


@dataclass(frozen=True)
class Site:
    """A quantized layer and the rows of its most frequent call."""

    plan: LayerPlan
    rows: int

    @property
    def key(self) -> tuple[int, ...]:
        """Layers of one key take the same time."""
        return (self.rows, self.plan.in_features, self.plan.out_features, self.plan.split)


@dataclass(frozen=True)
class Advice:
    """Layers of a case and whether they should stay in floating point. ``ratio`` is to the faster float linear."""

    layers: tuple[str, ...]
    rows: int
    ratio: float
    stay: str

    @property
    def text(self) -> str:
        """As "stay in bf16: M=1", or ""."""
        return f"stay in {self.stay}: M={self.rows}" if self.stay else ""


class _Counting(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.layers = {layer.node: layer for layer in quantized_layers(module)}
        self.rows: dict[str, collections.Counter[int]] = {}

    def run_node(self, n: fx.Node) -> object:
        if (layer := self.layers.get(n)) is not None:
            x = self.env[layer.arguments["q"]]
            self.rows.setdefault(layer.name, collections.Counter())[x.numel() // x.shape[-1]] += 1
        return super().run_node(n)


def sites_of(module: fx.GraphModule, rollout: Rollout) -> list[Site]:
    """Quantized layers with their rows in the first video of a rollout; layers that never get a row are left out.

    Args:
        module: a frozen module (of fxq.quantize or fxq.load) of the rollout's denoiser.
        rollout: the calls.
    """
    counting = _Counting(module)

    def run(*args: object) -> object:
        flat = flatten_call(module, args, {})
        return module.graph.process_outputs(counting.run(*flat, enable_io_processing=False))

    with torch.no_grad(), rollout.using(run):
        rollout.rollout(*rollout.batches[0])
    plans = {layer: plan for layer, (plan, _) in planned(module).items()}
    for counts in counting.rows.values():
        del counts[0]
    return [Site(plans[layer], counts.most_common(1)[0][0]) for layer, counts in counting.rows.items() if counts]


def layer_case(module: fx.GraphModule, sites: Iterable[Site], device: str) -> Case:
    """Sites of one key: quantize and integer linear of the first of them, against F.linear on its weight."""
    sites = list(sites)
    plan, rows = sites[0].plan, sites[0].rows
    stored = LayerTensors.of(module, plan, device)
    back = slice(None) if stored.perm is None else torch.argsort(stored.perm)
    x, bias = _inputs(rows, stored)
    x, w, own = x[:, back], stored.float_weight(), own_dtype(device)

    def plain(dtype: torch.dtype) -> Built:
        args = x.to(dtype), w.to(dtype), bias.to(dtype)
        return Built(lambda: F.linear(*args), "F.linear")

    def quantized() -> Built:
        return (_per_token if plan.quantization.per_token else _static)(x.to(own), stored)

    bounds, numbers = LEAST_SQNR["model"], "float8" if plan.quantization.is_float8 else "int8"
    contestants = (
        Contestant(FP32, lambda: plain(torch.float32), bounds["float32"], "float32"),
        Contestant(BF16, lambda: plain(torch.bfloat16), bounds["bfloat16"], "bfloat16", "bfloat16"),
        Contestant(OURS, quantized, bounds[numbers], numbers, dtype_name(own), ours=True),
    )
    facts = {"layers": [site.plan.layer for site in sites], "rows": rows, "outliers": len(plan.outliers)}
    name = f"M{rows} {plan.in_features}>{plan.out_features} {plan.quantization.detail}, {len(plan.outliers)} outliers"
    name += f", without {plan.transform}" if plan.transform else ""
    return Case(name, lambda: x.double() @ w.double().T + bias.double(), contestants, facts=facts)


def _inputs(rows: int, stored: LayerTensors) -> tuple[Tensor, Tensor]:
    """Inputs float32 [rows, K] in the order of the integers that use their whole range, and the bias."""
    plan, offset, generator = stored.plan, stored.offset, torch.Generator().manual_seed(0)
    scale, zero = stored.input_scale, stored.input_zero_point
    if scale is None or zero is None:
        x = torch.randn(rows, plan.in_features, generator=generator, dtype=torch.float32).to(offset.device)
        if scale is None:
            return x, offset
        group = (torch.arange(plan.in_features, device=scale.device) >= plan.split).long()
        return x * scale[group] * (float8.LARGEST / 8), offset
    low, high = numerics.integer_range(plan.quantization.input_bits)
    q = torch.randint(low, high + 1, (rows, plan.in_features), generator=generator).to(offset.device)
    return numerics.dequantize_input(q, scale, zero, plan.split), stored.bias().float()


def _static(x: Tensor, stored: LayerTensors) -> Built:
    plan, scheme, weight = stored.plan, stored.plan.quantization, _laid_out(stored)
    quantize, product = Operators.of(scheme)
    input_bits, bits = _bits(stored)
    zero = () if scheme.is_float8 else (stored.input_zero_point,)
    first = stored.perm, stored.input_scale, *zero, plan.split, *input_bits
    rest = stored.input_scale, stored.offset, plan.split, *bits, x.dtype

    def call() -> Tensor:
        result: Tensor = product(quantize(x, *first), weight, stored.weight_scale, *rest)
        return result

    return Built(call, kernels.used(product.name, str(x.device), weight))


def _bits(stored: LayerTensors) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bits of inputs and weights as arguments of the operators; those on float8 take none."""
    scheme = stored.plan.quantization
    return ((), ()) if scheme.is_float8 else ((scheme.input_bits,), (scheme.code_bits,))


def _per_token(x: Tensor, stored: LayerTensors) -> Built:
    plan, scheme, weight = stored.plan, stored.plan.quantization, _laid_out(stored)
    (quantize, product), (input_bits, bits) = Operators.of(scheme), _bits(stored)
    rest = weight, stored.weight_scale, stored.offset, plan.split, *bits, x.dtype

    def call() -> Tensor:
        q, scale = quantize(x, stored.perm, plan.split, *input_bits)
        result: Tensor = product(q, scale, *rest)
        return result

    return Built(call, kernels.used(product.name, str(x.device), weight))


def _laid_out(stored: LayerTensors) -> Tensor:
    """The weight as the kernels of its device read it."""
    here = native.ready() and not stored.weight.is_cuda and not stored.plan.quantization.is_float8
    return pack_panels(stored.codes(), stored.plan.split, stored.plan.quantization.code_bits) if here else stored.weight


def model_cases(module: fx.GraphModule, rollout: Rollout, device: str) -> list[Case]:
    """One case for all layers of the same shape, split and rows, in graph order."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites_of(module, rollout):
        groups.setdefault((*site.key, site.plan.quantization.detail), []).append(site)
    return [layer_case(module, sites, device) for sites in groups.values()]


def advise(result: CaseResult) -> Advice | None:
    """Whether the layers of a case gain by int8; None when it was not measured."""
    ratios = {name: result.ratio(OURS, name) for name in (BF16, FP32)}
    found = {name: ratio.median for name, ratio in ratios.items() if ratio is not None}
    if not found:
        return None
    fastest = min(found, key=lambda name: found[name])
    stay = "" if found[fastest] >= 1 else fastest.split()[0]
    return Advice(tuple(result.facts["layers"]), result.facts["rows"], found[fastest], stay)


def rules_text(advice: Iterable[Advice]) -> str:
    """Rules for a recipe file that keep the losing layers in floating point; "" when none loses."""
    lines = []
    for item in advice:
        for layer in item.layers if item.stay else ():
            reason = f"int8 is slower than {item.stay} at {item.rows} row{'s' * (item.rows != 1)}"
            lines.append(f'[[rules]]\npattern = "{layer}"\nreason = "{reason}"\n')
    return "\n".join(lines)
