import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fxq
from fxq.capture.trace import trace
from fxq.numerics import MAX_WIDTH
from tests.toys import recipe, rows, toy

X = rows(16, 64)


def quantized(model, data=None, chosen=None, **options):
    return fxq.quantize(model.eval(), [X] if data is None else data, chosen or recipe(8), progress=False, **options)


def reasons(module):
    return {row.layer: row.reason for row in fxq.summary(module).kept}


class Odd(nn.Module):
    """A plain linear, and one whose weight is of another kind."""

    def __init__(self, how):
        super().__init__()
        self.how, self.fc, self.q = how, nn.Linear(64, 64), nn.Linear(64, 64)
        self.v, self.r, self.row = (nn.Parameter(torch.randn(*shape)) for shape in ((64,), (96, 64), (1, 64)))
        self.none, self.nothing = nn.Linear(64, 0), nn.Linear(0, 64)
        self.normed = parametrizations.weight_norm(nn.Linear(64, 64))
        self.spectral = parametrizations.spectral_norm(nn.Linear(64, 64))

    def forward(self, x):
        forms = {
            "one axis": lambda: F.linear(x, self.v),
            "no outputs": lambda: self.none(x),
            "no inputs": lambda: self.nothing(x[:, :0]),
            "weight norm": lambda: self.normed(x),
            "spectral norm": lambda: self.spectral(x),
            "sliced": lambda: F.linear(x, self.r[:32]),
            "transposed": lambda: F.linear(x, self.q.weight.t()),
            "scaled": lambda: F.linear(x, self.q.weight * 2),
            "bias of two axes": lambda: F.linear(x, self.q.weight, self.row),
            "tied with another bias": lambda: F.linear(x, self.q.weight) + self.q(x),
        }
        return self.fc(x), forms[self.how]()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("one axis", "its weight has 1 axis, a quantized linear's has 2"),
        ("no outputs", "its weight is empty"),
        ("no inputs", "its weight is empty"),
        ("weight norm", "computed in the graph"),
        ("spectral norm", "computed in the graph"),
        ("sliced", "computed in the graph"),
        ("transposed", "computed in the graph"),
        ("scaled", "computed in the graph"),
        ("bias of two axes", r"its bias has shape \[1, 64\], expected \[64\]"),
        ("tied with another bias", "shared by linears with different biases"),
    ],
)
@pytest.mark.parametrize("chosen", ["w8a8", "w8a8-dynamic"])
def test_linears_of_odd_weights_are_kept_with_a_reason(how, reason, chosen):
    torch.manual_seed(0)
    model = Odd(how).eval()
    chosen = recipe(8) if chosen == "w8a8" else fxq.PRESETS[chosen]
    module = quantized(model, chosen=chosen)
    assert [row.layer for row in fxq.summary(module).quantized] == ["fc"]
    kept = [text for text in reasons(module).values() if "never called" not in text]
    assert len(kept) == 1 and torch.equal(module(X)[1], model(X)[1])
    assert re.search(reason, kept[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bias_that_is_not_finite_is_found_by_name_when_planning(value):
    model = toy()
    with torch.no_grad():
        model.blocks[0].down.bias[3] = value
    with pytest.raises(fxq.RecipeError, match=r"layer blocks.0.down: 1 of 96 values of its bias are NaN or infinite"):
        fxq.quantize(model, recipe=fxq.PRESETS["w8a8-dynamic"], example_inputs=rows(4, 96), progress=False)


def test_a_value_of_float64_beyond_float32_is_no_finite_one():
    model = nn.Sequential(nn.Linear(64, 64)).double()
    with torch.no_grad():
        model[0].weight[0, 0] = 1e300
    with pytest.raises(fxq.RecipeError, match="layer 0: 1 of 4096 weights are NaN or infinite"):
        quantized(model, [X.double()])


def test_sums_that_can_leave_int32_are_kept_before_any_work():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.over, self.most = nn.Linear(MAX_WIDTH + 1, 2), nn.Linear(MAX_WIDTH, 2)

        def forward(self, x):
            return self.over(x), self.most(x[:, 1:])

    x = rows(3, MAX_WIDTH + 1)
    module = quantized(Wide(), [x])
    assert reasons(module) == {
        "over": "131072 input channels can overflow the int32 sum of a product: at most 131071 fit"
    }
    extreme = torch.full((1, MAX_WIDTH), 127, dtype=torch.int64) * 127
    assert int(extreme.sum()) < 2**31 <= 128 * 128 * (MAX_WIDTH + 1)


@pytest.mark.parametrize("per_token", [False, True])
def test_models_in_float64_and_of_many_dtypes_work(per_token, tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64).double(), nn.Linear(64, 64).bfloat16()
            self.c, self.d = nn.Linear(64, 64), nn.Linear(64, 64).half()

        def forward(self, x):
            return self.c(self.b(self.a(x.double()).bfloat16()).float()) + self.d(x.half()).float(), self.a(x.double())

    torch.manual_seed(0)
    model, chosen = Mixed().eval(), recipe(8, per_token=per_token)
    module = quantized(model, None if not per_token else [X], chosen)
    assert not fxq.summary(module).kept
    fxq.save(module, tmp_path / "bundle")
    applied = fxq.apply(copy.deepcopy(model), tmp_path / "bundle")
    for made in (module, fxq.optimize(module), fxq.load(tmp_path / "bundle"), applied):
        for got, want in zip(made(X), model(X), strict=True):
            assert got.dtype == want.dtype and float((got - want).norm() / want.norm()) < 0.03


def made(how):
    module = quantized(nn.Sequential(nn.Linear(64, 64)))
    if how == "the result":
        return module
    if how == "optimized":
        return fxq.optimize(module)
    if how == "a part":
        return nn.Sequential(nn.Linear(64, 64), module)
    if how == "applied":
        return fxq.apply(copy.deepcopy(nn.Sequential(nn.Linear(64, 64))), module)
    return torch.export.export(module, (X,))


@pytest.mark.parametrize("how", ["the result", "optimized", "a part", "exported", "loaded"])
def test_what_is_quantized_already_is_refused_at_once(how, tmp_path):
    if how == "loaded":
        fxq.save(made("the result"), tmp_path / "bundle")
        model = fxq.load(tmp_path / "bundle")
    else:
        model = made(how)
    with pytest.raises(fxq.RecipeError, match=r"quantized already.*quantize the float model that it was made from"):
        fxq.quantize(model, [X], recipe(8), progress=False)


def test_a_model_whose_linears_were_replaced_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    applied = fxq.apply(model, quantized(model))
    with pytest.raises(fxq.RecipeError, match="its part 0 is quantized already"):
        fxq.quantize(applied, [X], recipe(8), progress=False)


def test_integers_that_only_the_graph_shows_are_refused():
    inner = quantized(nn.Sequential(nn.Linear(64, 64)))

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fc = [inner], nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(self.inner[0](x))

    graph = trace(Hidden().eval(), (X,))
    with pytest.raises(fxq.RecipeError, match=r"its graph has fxq.quantize_act.default"):
        fxq.core.pipeline.run_passes(graph, (fxq.passes.PlanLayers(recipe(8)),))
