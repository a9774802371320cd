"""Quantized models: what is not finite and what has no gradient is visible in every form that a model can take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxq
from fxq.passes.methods.ranges import MinMax

BAD = (float("nan"), float("inf"), -float("inf"))
FORMS = ("graph", "optimized", "applied", "compiled")


class Block(nn.Module):
    """A kept linear, a norm, two quantized linears around an activation, and a residual."""

    def __init__(self):
        super().__init__()
        self.kept, self.norm = nn.Linear(48, 48), nn.LayerNorm(48)
        self.ffn = nn.Sequential(nn.Linear(48, 96), nn.GELU(approximate="tanh"), nn.Linear(96, 48))

    def forward(self, x):
        h = self.kept(x)
        return h + self.ffn(self.norm(h))


def recipe(**scheme):
    rules = (fxq.Rule("*kept", None, "kept"), fxq.Rule("*", fxq.Scheme(**scheme)))
    return fxq.Recipe(name="plain", rules=rules, methods=(MinMax(),), weighting="uniform")


SCHEMES = {
    "static": {"weight_bits": 8},
    "static-4": {"weight_bits": 4, "input_bits": 6},
    "per-token": {"weight_bits": 8, "per_token": True},
    "asymmetric": {"weight_bits": 4, "per_token": True, "asymmetric": True},
}


@pytest.fixture(autouse=True)
def compile_anew():
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=SCHEMES)
def forms(request):
    torch.manual_seed(0)
    model = Block().eval()
    chosen = recipe(**SCHEMES[request.param])
    q = fxq.quantize(model, [torch.randn(2, 40, 48) for _ in range(2)], chosen, progress=False)
    return {
        "float": model,
        "graph": q,
        "optimized": fxq.optimize(q),
        "applied": fxq.apply(model, q),
        "compiled": torch.compile(q, backend="aot_eager"),
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_finite_shows_it_in_the_model(forms, form):
    x = torch.randn(2, 40, 48)
    with torch.no_grad():
        clean = forms[form](x)
        for i, value in enumerate(BAD):
            broken = x.clone()
            broken[1, 2 * i, 11 + i] = value
            y = forms[form](broken)
            lost = ~y.isfinite().all(-1)
            assert lost.nonzero().tolist() == [[1, 2 * i]]
            assert torch.equal(y[~lost], clean[~lost])


@pytest.mark.parametrize(("form", "source"), [*((form, "input") for form in FORMS), ("applied", "parameters")])
def test_a_gradient_through_a_quantized_layer_is_an_error(forms, form, source):
    model = forms[form]
    x = torch.randn(2, 40, 48, requires_grad=source == "input")
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(source == "parameters")
    assert parameters or source == "input"
    y = model(x)
    with pytest.raises(RuntimeError, match=r"fxq::\w+ has no gradient"):
        y.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_without_a_gradient_a_model_may_be_called_under_autograd(forms, form):
    model = forms[form]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = nn.Linear(48, 3)
    head(model(torch.randn(2, 40, 48))).sum().backward()
    assert head.weight.grad is not None and head.weight.grad.isfinite().all()


@pytest.mark.sweep
def test_a_model_compiled_by_the_backend_of_fxq_shows_both():
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 40, 48)
    q = fxq.quantize(model, [x], recipe(**SCHEMES["static"]), progress=False)
    compiled = torch.compile(model, backend="fxq", options={"fxq.recipe": q})
    x[1, 2, 3] = float("nan")
    with torch.no_grad():
        assert (~compiled(x).isfinite()).any(-1).nonzero().tolist() == [[1, 2]]
    with pytest.raises(RuntimeError, match=r"fxq::\w+ has no gradient"):
        compiled(x.requires_grad_()).sum().backward()


def test_a_narrow_layer_stays_in_float_unless_its_scales_are_measured_per_token():
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    data = [torch.randn(50, 12)]
    for scheme, kept in ((SCHEMES["static"], True), (SCHEMES["per-token"], False)):
        rules = (fxq.Rule("*", fxq.Scheme(**scheme)),)
        plain = fxq.Recipe(name="plain", rules=rules, methods=(MinMax(),), weighting="uniform")
        q = fxq.quantize(model, data, plain, progress=False)
        x = torch.randn(4, 12)
        x[1, 11] = float("nan")
        assert not q(x)[1].isfinite().any() and q(x)[[0, 2, 3]].isfinite().all()
        assert ("fewer than 16 input channels" in str(fxq.summary(q))) is kept
