import pytest
import torch
from torch import nn

import fxq
from fxq.capture.names import unsayable_name
from fxq.capture.trace import TraceError
from tests.toys import recipe


class Named(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(32, 8)})

    def forward(self, x):
        return next(iter(self.parts.values()))(x)


@pytest.mark.parametrize(
    ("name", "instead"),
    [("in", "in_"), ("lambda", "lambda_"), ("forward", "forward_"), ('a"b', "a_b"), ("a\nb", "a_b"), ("a\\b", "a_b")],
)
def test_a_name_that_code_cannot_say_is_refused_with_another(name, instead):
    model = Named("x")
    model.parts._modules[name] = model.parts._modules.pop("x")
    with pytest.raises(TraceError) as caught:
        fxq.quantize(model, [torch.randn(4, 32)], recipe(), progress=False)
    told = str(caught.value)
    assert repr(f"parts.{name}") in told and repr(instead) in told and "rename it in the model" in told
    model.parts._modules[instead] = model.parts._modules.pop(name)
    q = fxq.quantize(model, [torch.randn(4, 32)], recipe(), progress=False)
    assert [row.layer for row in fxq.summary(q).quantized] == [f"parts.{instead}"]


@pytest.mark.parametrize("name", ["0", "größe", "match", "self", "a-b", "two words"])
def test_other_names_stay(name):
    model = Named(name)
    assert unsayable_name(model) == ""
    q = fxq.quantize(model, [torch.randn(4, 32)], recipe(), progress=False)
    assert [row.layer for row in fxq.summary(q).quantized] == [f"parts.{name}"]
