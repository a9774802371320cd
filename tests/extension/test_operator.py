"""An operator from outside the package with the fusion that puts it into graphs: SwiGLU and quantize in one."""

import importlib

import pytest
import torch
from torch import nn

import fxq
from fxq.passes import FUSIONS
from tests.toys import recipe, rows

SOURCE = '''
"""silu(gate) * value and the quantization of the product as one operator, and the fusion that finds them."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch

from fxq import kernels
from fxq.core.layer import layers_reading
from fxq.kernels.arguments import Quantization
from fxq.kernels.op import declare
from fxq.passes import Rewrite, Stage
from fxq.passes.match import edits, patterns
from fxq.passes.match.patterns import ATEN, QUANTIZE, Unfit, is_call


class SwigluQuantize(NamedTuple):
    gate: torch.Tensor
    value: torch.Tensor
    quantization: Quantization


def _supports(a):
    if a.gate.shape != a.value.shape:
        return f"gate has shape {tuple(a.gate.shape)}: expected {tuple(a.value.shape)}"
    return kernels.quantize_act.supports(a.value, *a.quantization)


def _samples():
    scales = torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32)
    return [SwigluQuantize(torch.randn(5, 40), torch.randn(5, 40), Quantization(None, *scales, 40, 8))]


@declare(
    SwigluQuantize,
    fake=lambda a: torch.empty_like(a.value, dtype=torch.int8),
    samples=_samples,
    supports=_supports,
)
def swiglu_quantize(a):
    """int8 [..., K] of ``silu(gate) * value``, both [..., K]."""
    return kernels.quantize_act.reference(torch.nn.functional.silu(a.gate) * a.value, *a.quantization)


@dataclasses.dataclass(frozen=True)
class FuseSwiGLU(Rewrite):
    """``quantize_act(silu(gate) * value)`` becomes ``fxq::swiglu_quantize``."""

    needs: ClassVar[Stage] = Stage.FROZEN
    gives: ClassVar[Stage] = Stage.FUSED
    repeatable: ClassVar[bool] = True

    def run(self, graph):
        return sum(self.fuse(graph, node) for node in patterns.calls(graph, QUANTIZE))

    def fuse(self, graph, quantize):
        product = quantize.args[0]
        if not is_call(product, ATEN.mul.Tensor) or not is_call(product.args[0], ATEN.silu.default):
            return False
        args = (product.args[0].args[0], product.args[1], *quantize.args[1:])
        try:
            edits.check_private(edits.between([quantize], args[:2]), [quantize], args[:2])
            edits.check_fits(graph, swiglu_quantize, args)
        except Unfit as reason:
            graph.note("", f"SwiGLU apart from its quantize: {reason}")
            return False
        value = patterns.value_of(quantize)
        fused = edits.insert(quantize, quantize, swiglu_quantize.definition, args, value)
        quantize.replace_all_uses_with(fused)
        edits.erase_unread(quantize)
        for layer in layers_reading(fused):
            graph.remark(layer, "its input is gated and quantized in one")
        return True
'''


class SwiGLU(nn.Module):
    """The feed-forward of Llama."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def outside_module(outside):
    outside.install("swiglu_for_fxq", SOURCE)
    return importlib.import_module("swiglu_for_fxq")


def test_the_operator_keeps_the_contract_of_the_shipped_ones(outside_module):
    op = outside_module.swiglu_quantize
    for arguments in op.samples():
        torch.library.opcheck(op.definition, arguments)
        assert torch.equal(op(*arguments), op.reference(*arguments))
    gate, *rest = op.samples()[0]
    with pytest.raises(ValueError, match=r"gate has shape \(4, 40\): expected \(5, 40\)"):
        op(gate[:4], *rest)


def test_the_fusion_puts_it_into_the_graph_and_the_result_is_the_same(outside_module):
    torch.manual_seed(0)
    model = SwiGLU().eval()
    quantized = fxq.quantize(model, [rows(50, 64)], recipe(), progress=False)
    plain = fxq.optimize(quantized)
    fused = fxq.optimize(quantized, passes=(*FUSIONS, outside_module.FuseSwiGLU()))
    op = outside_module.swiglu_quantize.definition

    def calls(module):
        return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]

    assert str(op) in calls(fused) and str(op) not in calls(plain)
    assert len(calls(plain)) - len(calls(fused)) == 2, "silu, mul and quantize are one"
    x = rows(7, 64, seed=5)
    assert torch.equal(fused(x), plain(x))
    told = {row.layer: row.remarks for row in fxq.summary(fused).rows}
    assert "its input is gated and quantized in one" in told["down"]
    assert ["FuseSwiGLU", 1] in fxq.summary(fused).facts["passes"]
