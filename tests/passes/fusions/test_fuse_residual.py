import re

import pytest
import torch
from torch import nn

from fxq.core.ir import plan_of
from fxq.passes.fusions.fuse_residual import FuseResidual
from fxq.passes.fusions.lay_out_weights import LayOutWeights
from tests.passes.fusions.fusing import count, error, frozen, fused
from tests.toys import rows

WIDTH = 65


class Residual(nn.Module):
    """A linear whose result is gated and added in one of many forms."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.o = nn.Linear(48, WIDTH)

    def forward(self, x, rest, gate):
        y = self.o(x)
        match self.how:
            case "bare":
                return rest + y
            case "swapped":
                return gate * y + rest
            case "per frame":
                return rest + (y.unflatten(1, (3, -1)) * gate).flatten(1, 2)
            case "cast":
                return (rest.float() + y * gate.float()).type_as(rest)
            case "shared cast":
                wide = rest.float()
                return (wide + y * gate.float()).type_as(rest) + wide.mean().type_as(rest)
            case "two readers":
                return rest + y * gate + y.mean()
            case "gate wanted":
                return rest + y * gate, gate
            case "sum of itself":
                return y + y.relu()
        return rest + y * gate


def inputs(gate=(2, 1, WIDTH), dtype=torch.float32, x=(2, 15, 48), rest=(2, 15, WIDTH)):
    return tuple(rows(*shape, seed=i).to(dtype) for i, shape in enumerate((x, rest, gate)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("how", "gate"),
    [
        ("bare", (2, 1, WIDTH)),
        ("per batch", (2, 1, WIDTH)),
        ("swapped", (2, 1, WIDTH)),
        ("per token", (2, 15, WIDTH)),
        ("per frame", (2, 3, 1, WIDTH)),
        ("cast", (2, 1, WIDTH)),
    ],
)
def test_gate_and_residual_become_the_epilogue_of_their_linear(how, gate, dtype):
    args = inputs(gate, dtype)
    q = frozen(Residual(how).to(dtype), args)
    graph = fused(q, FuseResidual())
    assert count(graph, "fxq.dual_scale_linear_add") == 1
    assert count(graph, "fxq.dual_scale_linear") == count(graph, "aten.add") == count(graph, "aten.mul") == 0
    assert error(graph, q, *args) < (1e-6 if dtype == torch.float32 else 1e-2)
    what = "residual" if how == "bare" else "gate and residual"
    assert graph.remarks == {"o": [f"{what} in its epilogue"]}


@pytest.mark.parametrize("scheme", [{}, {"asymmetric": True}], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("how", "gate"), [("bare", (2, 1, WIDTH)), ("per frame", (2, 3, 1, WIDTH))])
def test_products_with_scales_per_token_have_the_same_epilogue(how, gate, dtype, scheme):
    args = inputs(gate, dtype)
    q = frozen(Residual(how).to(dtype), args, per_token=True, **scheme)
    graph = fused(q, FuseResidual(), LayOutWeights())
    (node,) = (n for n in graph.module.graph.nodes if plan_of(n) is not None)
    assert str(node.target) == "fxq.dual_scale_linear_per_token_add.default" and plan_of(node).layer == "o"
    assert count(graph, "fxq.dual_scale_linear_per_token") == count(graph, "aten.add") == count(graph, "aten.mul") == 0
    assert error(graph, q, *args) < (1e-6 if dtype == torch.float32 else 1e-2)
    what = "residual" if how == "bare" else "gate and residual"
    assert graph.remarks["o"][0] == f"{what} in its epilogue"


def test_a_cast_of_the_residual_stays_for_its_other_readers():
    args = inputs(dtype=torch.bfloat16)
    q = frozen(Residual("shared cast").to(torch.bfloat16), args)
    graph = fused(q, FuseResidual())
    (node,) = (n for n in graph.module.graph.nodes if "linear_add" in str(n.target))
    assert node.args[7].op == "placeholder" and count(graph, "aten.mean") == 1
    assert error(graph, q, *args) < 1e-2


def test_the_plan_lies_on_the_fused_node():
    q = frozen(Residual("per batch"), inputs())
    graph = fused(q, FuseResidual())
    (node,) = (n for n in graph.module.graph.nodes if plan_of(n) is not None)
    assert str(node.target) == "fxq.dual_scale_linear_add.default" and plan_of(node).layer == "o"


def test_another_batch_size_runs():
    q = frozen(Residual("per frame"), inputs((2, 3, 1, WIDTH)))
    args = inputs((4, 3, 1, WIDTH), x=(4, 15, 48), rest=(4, 15, WIDTH))
    assert error(fused(q, FuseResidual()), q, *args) < 1e-6


@pytest.mark.parametrize(
    ("how", "args", "reason"),
    [
        ("two readers", inputs(), "residual not in its epilogue: dual_scale_linear_default is also read by m"),
        ("per token", inputs((2, 15, 1)), r"gate is \[s\d+, 15, 1\]: expected \[s\d+, 1, 65\] or \[s\d+, 15, 65\]"),
        ("a vector", inputs((WIDTH,)), r"gate is \[65\]: expected"),
        ("bare", inputs(rest=(2, 1, WIDTH)), r"rest is \[s\d+, 1, 65\]: expected \[s\d+, 15, 65\]"),
        ("bare", inputs(x=(15, 48), rest=(15, WIDTH)), r"q has shape \(s?\d+, 48\): expected \[B, S, K\]"),
        ("sum of itself", inputs(), "dual_scale_linear_default is also read by relu"),
    ],
)
def test_what_is_not_of_the_form_stays_with_the_reason(how, args, reason):
    q = frozen(Residual(how), args)
    graph = fused(q, FuseResidual())
    assert count(graph, "fxq.dual_scale_linear") == 1 and count(graph, "fxq.dual_scale_linear_add") == 0
    assert error(graph, q, *args) == 0
    (text,) = graph.remarks["o"]
    assert re.search(reason, text), text


def test_a_sum_in_another_dtype_than_the_residual_stays_with_the_reason():
    x, rest, gate = inputs(dtype=torch.bfloat16)
    args = (x, rest, gate.float())
    q = frozen(Residual("per batch").to(torch.bfloat16), args)
    graph = fused(q, FuseResidual())
    assert count(graph, "fxq.dual_scale_linear_add") == 0
    assert graph.remarks["o"][0].endswith("its residual is torch.bfloat16, their sum torch.float32")
