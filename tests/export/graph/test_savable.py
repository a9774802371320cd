"""What cannot be saved is found before calibration, by node and line; sizes may be computed as models do."""

import collections
import math

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxq
from fxq.export.graph.foreign import allowing, allowing_all, find_foreign, is_foreign
from fxq.passes.methods.ranges import MinMax

RECIPE = fxq.Recipe(name="r", rules=(fxq.Rule("*", fxq.Scheme()),), methods=(MinMax(),), weighting="uniform")
FIXED = {1: Dim.AUTO}


class Cut(nn.Module):
    """Keeps as many tokens as a function of their number says."""

    def __init__(self, size):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.size = nn.Linear(32, 32), size

    def forward(self, x):
        return self.fc(x[:, : self.size(x.shape[1])])


@pytest.mark.parametrize(
    "size",
    [
        lambda n: math.ceil(n / 2),
        lambda n: math.floor(n / 2),
        lambda n: math.trunc(n / 2),
        lambda n: -(-n // 2),
        lambda n: abs(3 - n),
        lambda n: max(n, 3) - 1,
        lambda n: n % 3 + 1,
        lambda n: torch.sym_max(n, 3),
        lambda n: torch.sym_sum([n, n, 2]) // 3,
    ],
    ids=["ceil", "floor", "trunc", "ceil by floor", "abs", "max", "mod", "sym_max", "sym_sum"],
)
def test_sizes_computed_from_sizes_are_saved(size, tmp_path):
    model = Cut(size).eval()
    q = fxq.quantize(model, [torch.randn(2, 8, 32)], RECIPE, dynamic_shapes=(FIXED,), progress=False)
    fxq.save(q, tmp_path / "b")
    x = torch.randn(2, 7, 32)
    for module in (q, fxq.load(tmp_path / "b")):
        assert module(x).shape == model(x).shape
        assert (module(x) - model(x)).norm() < 0.06 * model(x).norm()


class Calls:
    """Batches that must not be asked for more than the first."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        yield self.batches[0]
        raise AssertionError("calibration started")


Pair = collections.namedtuple("Pair", "first second")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        return Pair(self.fc(x), collections.defaultdict(list, a=x))


def test_what_has_no_place_in_a_bundle_is_refused_before_calibration():
    with pytest.raises(fxq.TraceError, match=r"could not be saved: .*calling convention"):
        fxq.quantize(Named().eval(), Calls(torch.randn(2, 32)), RECIPE, progress=False)


def test_arithmetic_without_a_place_is_refused_with_its_line():
    model, x = Cut(lambda n: n >> 1).eval(), torch.randn(2, 8, 32)
    with pytest.raises(fxq.TraceError, match=r"node rshift.*, at test_savable\.py:\d+ `"):
        fxq.quantize(model, Calls(x), RECIPE, dynamic_shapes=(FIXED,), progress=False)
    q = fxq.quantize(model, [x], RECIPE, progress=False)  # the size is fixed, so nothing is computed
    assert q(x).shape == (2, 4, 32)


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.out",
        "fxq.other.default",
        "prims.x.default",
        "_c10d.x.default",
        "a.b",
        "a.b.c.d",
        "a.__init__.b",
        "a.b-c.d",
        "",
        None,
        7,
        "x" * 400 + ".b.c",
    ],
)
def test_operators_of_torch_are_not_foreign(name):
    assert not is_foreign(name)
    with allowing_all():
        assert find_foreign(name) is None


def test_a_foreign_operator_that_is_not_registered_is_not_found():
    with allowing(["nowhere.op"]):
        assert find_foreign("nowhere.op.default") is None
    assert is_foreign("nowhere.op.default")
