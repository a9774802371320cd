import re

import pytest
import torch
from torch import nn

import fxq
from tests.toys import recipe, relative_error, rows


class Shared(nn.Module):
    """One weight in several places; ``how`` says which."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64, bias=how != "plain")
        self.b.weight = self.a.weight
        if how == "plain":
            self.a.bias = None
        if how == "bias too":
            self.b.bias = self.a.bias
        if how == "two biases":
            self.b.bias.data += 3
        if how == "own offset":
            self.b = self.a
            self.a.offset = nn.Parameter(torch.full((64,), 5.0))

    def forward(self, x):
        y = self.b(torch.tanh(self.a(x)))
        if self.how == "read elsewhere":
            y = y + self.a.weight.sum(0)
        return y + self.a.offset if self.how == "own offset" else y


@pytest.mark.parametrize("how", ["plain", "bias too"])
def test_a_weight_used_twice_is_stored_once(how):
    model, x = Shared(how).eval(), rows(30, 64)
    q = fxq.quantize(model, [x], recipe())
    (row,) = fxq.summary(q).rows
    assert row.quantized and row.layer in ("a", "b")  # torch.export chooses one of the names
    assert relative_error(model, q, x) < 0.03
    assert [name for name, b in q.named_buffers() if b.dtype == torch.int8] == [f"{row.layer}.weight"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("two biases", "its weight is shared by linears with different biases"),
        ("read elsewhere", "its weight is also read by sum"),
        ("own offset", r"the model has a tensor of its own named [ab]\.offset"),
    ],
)
def test_a_weight_that_integers_cannot_replace_is_kept_with_the_reason(how, reason):
    model, x = Shared(how).eval(), rows(30, 64)
    q = fxq.quantize(model, [x], recipe())
    (row,) = fxq.summary(q).rows
    assert not row.quantized
    assert re.match(reason, row.reason)
    assert torch.equal(q(x), model(x))


class Tied(nn.Module):
    """An embedding that is also the last linear."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.middle = nn.Linear(64, 64)
        self.last.weight = self.embed.weight

    def forward(self, index):
        return self.last(self.middle(self.embed(index)))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_embedding_is_kept_and_its_neighbours_quantized(bits):
    model, index = Tied().eval(), torch.arange(23)
    q = fxq.quantize(model, [index], recipe(bits))
    (kept,), (quantized,) = fxq.summary(q).kept, fxq.summary(q).quantized
    assert quantized.layer == "middle" and kept.reason == "its weight is also read by embedding"
    assert relative_error(model, q, index) < 0.3
