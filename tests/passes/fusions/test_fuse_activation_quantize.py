import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.core.graph import arguments
from fxq.core.ir import planned
from fxq.core.layer import layers_reading
from fxq.kernels import native
from fxq.kernels.gemm.activations import ACTIVATIONS, Activation, add
from fxq.passes.fusions.fuse_activation_quantize import FuseActivationQuantize
from fxq.passes.fusions.lay_out_weights import LayOutWeights
from tests.passes.fusions.fusing import count, error, frozen, fused
from tests.toys import rows


class Feed(nn.Module):
    """Two linears and what stands between."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 33)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.up(x)
        match self.how:
            case "none":
                return self.down(y)
            case "gelu" | "tanh":
                return self.down(self.drop(F.gelu(y, approximate="tanh" if self.how == "tanh" else "none")))
            case "cast":
                return self.down(F.gelu(y.float()).type_as(y))
            case "two readers":
                y = F.gelu(y)
                return self.down(y) + y.mean()
            case "linear read":
                return self.down(F.gelu(y)) + y.mean()
            case "flattened":
                return self.down(F.gelu(y).flatten(0, 1))
            case "silu":
                return self.down(F.silu(y))
            case "leaky":
                return self.down(F.leaky_relu(y, 0.1))
            case "leakier":
                return self.down(F.leaky_relu(y, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("how", "activation"), [("none", "none"), ("gelu", "gelu"), ("tanh", "gelu_tanh"), ("cast", "gelu")]
)
def test_activation_and_quantize_become_the_epilogue_of_the_linear_before(how, activation, dtype):
    x = rows(2, 15, 48).to(dtype)
    q = frozen(Feed(how).to(dtype), (x,))
    graph = fused(q, FuseActivationQuantize())
    (node,) = (n for n in graph.module.graph.nodes if "linear_quantize" in str(n.target))
    assert node.args[7] == activation
    assert count(graph, "aten.gelu") == 0 and count(graph, "fxq.quantize_act") == 1
    assert error(graph, q, x) < (1e-5 if dtype == torch.float32 else 2e-2)
    what = "the next quantize" if how == "none" else "gelu and the next quantize"
    assert graph.remarks == {"up": [f"{what} in its epilogue"]}
    plans = planned(graph.module)
    assert list(plans) == ["up", "down"] and plans["up"][1] == [node]


MEASURED = {"activation_quantize_per_token": {}, "activation_quantize_per_token_asymmetric": {"asymmetric": True}}


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("how", "activation"), [("gelu", "gelu"), ("tanh", "gelu_tanh"), ("cast", "gelu")])
def test_scales_per_token_are_measured_behind_the_activation(how, activation, dtype, name):
    x = rows(2, 15, 48).to(dtype)
    q = frozen(Feed(how).to(dtype), (x,), per_token=True, **MEASURED[name])
    graph = fused(q, FuseActivationQuantize(), LayOutWeights())
    (node,) = (n for n in graph.module.graph.nodes if str(n.target) == f"fxq.{name}.default")
    assert arguments(node)["activation"] == activation and layers_reading(node) == ["down"]
    assert count(graph, "aten.gelu") == 0 and count(graph, name.replace("activation_", "fxq.")) == 1
    assert error(graph, q, x) < 1e-2
    assert graph.remarks["down"][0] == "gelu fused into its quantize" and graph.log[0][1] == 1
    assert not any("stays apart" in text for text in graph.remarks["down"])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("two readers", r"gelu not fused into its quantize: gelu is also read by"),
        ("flattened", r"what is quantized is \[15\*s\d+, 96\], not \[s\d+, 15, 96\]"),
        ("silu", "input scales are measured per token: quantize stays apart from what gives its input"),
    ],
)
def test_an_activation_before_scales_per_token_stays_with_the_reason(how, reason):
    x = rows(2, 15, 48)
    q = frozen(Feed(how), (x,), per_token=True)
    graph = fused(q, FuseActivationQuantize(), LayOutWeights())
    assert count(graph, "fxq.activation_quantize_per_token") == 0 and count(graph, "fxq.quantize_per_token") == 2
    assert error(graph, q, x) < 1e-6
    assert re.search(reason, graph.remarks["down"][0]), graph.remarks


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("two readers", r"its result is read by quantize_act_default_1 and mean"),
        ("linear read", r"dual_scale_linear_default is also read by mean"),
        ("flattened", r"what is quantized is \[15\*s\d+, 96\], the result \[s\d+, 15, 96\]"),
    ],
)
def test_what_is_not_of_the_form_stays_with_the_reason(how, reason):
    x = rows(2, 15, 48)
    q = frozen(Feed(how), (x,))
    graph = fused(q, FuseActivationQuantize())
    assert count(graph, "fxq.dual_scale_linear_quantize") == 0
    assert error(graph, q, x) == 0
    (text,) = graph.remarks["up"]
    assert text.startswith("gelu and the next quantize not in its epilogue: ") and re.search(reason, text), text


def test_an_activation_that_has_no_fused_form_stays():
    x = rows(2, 15, 48)
    graph = fused(frozen(Feed("silu"), (x,)), FuseActivationQuantize())
    assert count(graph, "aten.silu") == 1 and graph.log[0][1] == 0


@pytest.fixture
def leaky():
    calls = {torch.ops.aten.leaky_relu.default: {"negative_slope": 0.1}}
    yield add(Activation("leaky", lambda x: F.leaky_relu(x, 0.1), calls=calls))
    del ACTIVATIONS["leaky"]


def test_an_activation_from_outside_is_fused_and_said_to_be_computed_by_torch(leaky):
    x = rows(2, 15, 48)
    q = frozen(Feed("leaky"), (x,))
    graph = fused(q, FuseActivationQuantize())
    (node,) = (n for n in graph.module.graph.nodes if "linear_quantize" in str(n.target))
    assert node.args[7] == "leaky" and error(graph, q, x) < 1e-5
    eager = "; the native kernels have no leaky: torch computes it" if native.ready() else ""
    assert graph.remarks == {"up": [f"leaky_relu and the next quantize in its epilogue{eager}"]}


def test_a_call_with_other_values_is_another_activation(leaky):
    graph = fused(frozen(Feed("leakier"), (rows(2, 15, 48),)), FuseActivationQuantize())
    assert count(graph, "aten.leaky_relu") == 1 and graph.log[0][1] == 0


def test_an_order_of_channels_that_was_not_folded_stays_with_the_reason():
    model, x = nn.ModuleDict({"blocks": nn.ModuleList([Feed("gelu")])}), rows(2, 15, 48)
    with torch.no_grad():
        model.blocks[0].down.weight[:, 3:35:4] *= 6
    model.forward = model.blocks[0].forward
    q = frozen(model, (x,), dual_scale=True)
    graph = fused(q, FuseActivationQuantize())
    assert count(graph, "fxq.dual_scale_linear_quantize") == 0
    (text,) = graph.remarks["blocks.0.up"]
    assert text.endswith("FoldPermutations did not fold the channel order of blocks.0.down")
