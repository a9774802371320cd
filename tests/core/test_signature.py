import pytest
import torch
from torch import nn

import fxq
from fxq.core.signature import InputError
from fxq.passes.methods.ranges import MinMax

RECIPE = fxq.Recipe(name="r", rules=(fxq.Rule("*", fxq.Scheme()),), methods=(MinMax(),))


class Flat(nn.Module):
    """Folds its last two dimensions with a size fixed when it is captured."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 33)

    def forward(self, x, *, gain=None):
        y = self.linear(x.flatten(1)[:, :64])
        return y if gain is None else y * gain


def test_another_batch_size_runs_without_being_asked_for():
    model = Flat().eval()
    q = fxq.quantize(model, [torch.randn(64, 2, 32)], RECIPE, progress=False)
    for batch in (1, 7):
        x = torch.randn(batch, 2, 32)
        assert (q(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_a_size_the_graph_was_not_captured_for_is_refused_by_name(tmp_path):
    q = fxq.quantize(Flat().eval(), [torch.randn(4, 2, 32)], RECIPE, progress=False)
    fxq.save(q, tmp_path / "b")
    for module in (q, fxq.load(tmp_path / "b")):
        with pytest.raises(
            InputError, match=r"input x has shape \[4, 3, 32\], the graph was captured for \[any, 2, 32\]"
        ):
            module(torch.randn(4, 3, 32))


def test_a_batch_the_model_fixes_is_refused_and_not_misread():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x):
            return self.linear(x).view(2, -1) if x.shape[0] == 2 else self.linear(x)

    q = fxq.quantize(Fixed().eval(), [torch.randn(2, 3, 32)], RECIPE, progress=False)
    with pytest.raises(InputError, match=r"captured for \[2, 3, 32\]"):
        q(torch.randn(4, 3, 32))


def test_keyword_calls_are_checked_too():
    q = fxq.quantize(Flat().eval(), [{"x": torch.randn(4, 2, 32), "gain": torch.ones(33)}], RECIPE, progress=False)
    assert q(x=torch.randn(5, 2, 32), gain=torch.ones(33)).shape == (5, 33)
    with pytest.raises(InputError, match="missing \\['gain'\\]"):
        q(x=torch.randn(5, 2, 32))


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def forward(self, x, count, flag=True, mask=None):
        return self.linear(x) * count if flag else self.linear(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"count": 3}, "input count is 3, the graph was captured for 2: what is not a tensor is a constant"),
        ({"count": 2.0}, "input count is 2.0, the graph was captured for 2"),
        ({"flag": False}, "input flag is False, the graph was captured for True"),
        ({"mask": torch.ones(4)}, r"input mask is a tensor of shape \[4\], the graph was captured for None"),
        ({"x": 5}, r"input x is 5, the graph was captured for a tensor of shape \[any, 64\]"),
    ],
)
def test_another_constant_than_the_captured_one_is_refused(call, message, tmp_path):
    given = {"x": torch.ones(4, 64), "count": 2, "flag": True, "mask": None}
    quantized = fxq.quantize(Steps().eval(), [given], RECIPE, progress=False)
    fxq.save(quantized, tmp_path / "bundle")
    for module in (quantized, fxq.load(tmp_path / "bundle")):
        assert module(**given).shape == (4, 32)
        with pytest.raises(InputError, match=message):
            module(**(given | call))
