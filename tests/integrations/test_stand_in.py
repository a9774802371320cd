import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.integrations.stand_in import FloatStandIn
from fxq.integrations.swap import ApplyError, apply
from tests.toys import recipe, relative_error, rows, toy


@pytest.fixture(scope="module")
def layer():
    model = toy()
    quantized = fxq.quantize(model, [rows(6, 96)], recipe(), progress=False)
    return apply(model, quantized).blocks[0].up


X = rows(5, 96)

READS = {
    "times": lambda w, b: X @ w.t(),
    "times from the right": lambda w, b: w @ X.t(),
    "torch.matmul": lambda w, b: torch.matmul(X, w),
    "addmm": lambda w, b: torch.addmm(b, X, w),
    "einsum": lambda w, b: torch.einsum("bi,oi->bo", X, w),
    "sum with the bias": lambda w, b: rows(5, 64) + b,
    "linear without the bias": lambda w, b: F.linear(X, w),
    "linear with another bias": lambda w, b: F.linear(X, w, torch.ones(64)),
    "linear of the bias": lambda w, b: F.linear(X, b, b),
    "abs": lambda w, b: w.abs(),
    "data": lambda w, b: w.data,
    "detach": lambda w, b: w.detach(),
    "part": lambda w, b: w[:32],
    "write to a part": lambda w, b: w.__setitem__(0, 1.0),
    "in place": lambda w, b: w.mul_(2),
    "augmented": lambda w, b: w.__iadd__(1),
    "cast": lambda w, b: w.float(),
    "moved": lambda w, b: w.to("cpu"),
    "cat": lambda w, b: torch.cat([w, w]),
    "norm": lambda w, b: torch.linalg.norm(w),
    "numpy": lambda w, b: w.numpy(),
    "asarray": lambda w, b: np.asarray(w),
    "item": lambda w, b: w.sum().item(),
    "rows": lambda w, b: list(w),
    "compare": lambda w, b: w == w,
    "truth": lambda w, b: bool(b),
    "parameter": lambda w, b: nn.Parameter(w),
    "initialize": lambda w, b: nn.init.xavier_uniform_(w),
    "copy from": lambda w, b: torch.empty(64, 96).copy_(w),
    "multiply a tensor": lambda w, b: torch.ones(64, 96) * w,
    "multiply a number": lambda w, b: 2 * w,
    "embedding": lambda w, b: F.embedding(torch.tensor([1]), w),
    "pointer": lambda w, b: w.data_ptr(),
    "gradient": lambda w, b: w.requires_grad_(),
    "set data": lambda w, b: setattr(w, "data", torch.ones(64, 96)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_whoever_reads_or_writes_values_gets_an_error_with_the_layers_name(layer, read):
    with pytest.raises(ApplyError, match=r"blocks\.0\.up is quantized, its float (weight|bias) is gone: .* a rule"):
        read(layer.weight, layer.bias)


def test_linear_of_a_layers_weight_and_bias_is_the_layer(layer):
    assert torch.equal(F.linear(X, layer.weight, layer.bias), layer(X))
    assert torch.equal(F.linear(input=X, weight=layer.weight, bias=layer.bias), layer(X))


def test_the_form_is_that_of_a_tensor(layer):
    weight, like = layer.weight, torch.empty(64, 96)
    for name in ("shape", "ndim", "dtype", "device", "layout", "nbytes", "requires_grad", "is_cuda", "is_leaf", "grad"):
        assert getattr(weight, name) == getattr(like, name), name
    for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size", "type"):
        assert getattr(weight, name)() == getattr(like, name)(), name
    assert (weight.size(-1), weight.stride(0), len(weight)) == (96, 96, 64)
    assert "blocks.0.up.weight" in repr(weight)
    assert not hasattr(weight, "quant_state") and weight.requires_grad_(False) is weight
    weight.requires_grad = False


def test_tensors_are_cast_and_made_to_its_form(layer):
    half = copy.deepcopy(layer).half().weight
    assert torch.ones(3).to(half.dtype).dtype == torch.ones(3).to(half).dtype == torch.float16
    assert torch.ones(3).type_as(half).dtype == half.new_zeros(2).dtype == torch.float16
    assert torch.zeros_like(half).shape == (64, 96) and torch.empty_like(half, dtype=torch.int8).dtype == torch.int8


def test_it_follows_its_layer_into_copies(layer):
    held = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    held.weight = held["layer"].weight
    other = copy.deepcopy(held).half()
    assert isinstance(other.weight, FloatStandIn) and other.weight.dtype == torch.float16
    assert held.weight.dtype == torch.float32


class Casting(nn.Module):
    """Reads the form of its linears' weights wherever models do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(96, 64), nn.Linear(64, 32)

    def forward(self, x):
        x = x.to(self.first.weight.dtype).to(self.first.weight.device)
        x = F.linear(x, self.first.weight, self.first.bias)
        assert x.shape[-1] == self.second.weight.shape[1]
        return self.second(x.to(next(self.parameters()).dtype)).type_as(self.second.weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_that_asks_for_the_form_of_its_weights_computes_what_the_graph_does(bits):
    model = Casting().eval()
    quantized = fxq.quantize(model, [X], recipe(bits), progress=False)
    applied = apply(model, quantized)
    assert relative_error(quantized, applied, X) < 1e-6
    torch._dynamo.reset()
    assert relative_error(quantized, torch.compile(applied, backend="eager", fullgraph=True), X) < 1e-6
    assert applied.bfloat16()(X).dtype == torch.bfloat16
