"""What a capture rests on is refused or right in every form of the module; torch.export's own answer is the measure."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxq
from fxq.capture.trace import TraceError, trace
from fxq.core.signature import InputError, rules_of
from fxq.passes.methods.ranges import MinMax

RECIPE = fxq.Recipe(name="r", rules=(fxq.Rule("*", fxq.Scheme()),), methods=(MinMax(),), weighting="uniform")


class Small(nn.Module):
    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.other = nn.Linear(32, 32), nn.Linear(32, 32)
        self.run = run

    def forward(self, x, y=None):
        return self.run(self, x) if y is None else self.run(self, x, y)


def even(self, x):
    if x.shape[0] % 2 == 0:
        first, second = self.fc(x).chunk(2)
        return torch.cat((first + 5 * (second - first), second))
    return self.fc(x)


def short(self, x):
    return self.fc(x - x.mean(1, keepdim=True) if x.shape[1] > 16 else x)


def area(self, x):
    return self.fc(x) * (2 if x.shape[0] * x.shape[1] > 20 else 1)


def halves(self, x):
    return self.fc(x) * (2 if -(-x.shape[1] // 2) > 4 else 1)


def one(self, x):
    y = self.fc(x)
    return y if x.shape[0] == 1 else y - y.mean(0)


def more_than_one(self, x):
    return self.fc(x) * 10 if x.shape[0] > 1 else self.fc(x)


def truth(self, x):
    return self.fc(x) if x.shape[0] - 1 else self.fc(x) * 5


def loop(self, x):
    return sum(self.fc(part) for part in x.split([2] * (x.shape[1] // 2), 1))


def alike(self, x, y):
    return self.fc(x) + self.other(y) if x.shape[0] == y.shape[0] else self.fc(x)


def twice(self, x, y):
    return self.fc(x).repeat(2, 1) + y if y.shape[0] == 2 * x.shape[0] else self.fc(x)


def prefix(self, x, y):
    if y.shape[1] == 0:
        return self.fc(x)
    return self.fc(torch.cat((y, x), 1))[:, y.shape[1] :] + y.sum()


def number(self, x, n):
    return self.fc(x) * (3 if n > 4 else 1) + n


def window(self, x):
    return self.fc(x[:, : min(x.shape[1], 8)])


AUTO = {0: Dim.AUTO, 1: Dim.AUTO}


RANDOM = torch.Generator().manual_seed(0)


def rows(*shape):
    return torch.randn(*shape, 32, generator=RANDOM)


@pytest.mark.parametrize(
    ("run", "example", "shapes", "right", "refused"),
    [
        (even, (rows(4),), None, [(rows(6),)], [(rows(3),)]),
        (short, (rows(2, 8),), ({1: Dim("t", min=3, max=16)},), [(rows(2, 16),)], [(rows(2, 24),), (rows(2, 2),)]),
        (short, (rows(2, 8),), ({1: Dim.AUTO},), [(rows(2, 16),), (rows(2, 1),)], [(rows(2, 24),)]),
        (area, (rows(4, 8),), (AUTO,), [(rows(5, 5),)], [(rows(2, 3),)]),
        (halves, (rows(2, 8),), (AUTO,), [(rows(2, 7),)], [(rows(2, 10),), (rows(2, 9),)]),
        (one, (rows(4),), None, [(rows(2),)], [(rows(1),)]),
        (more_than_one, (rows(4),), None, [(rows(2),)], [(rows(1),)]),
        (truth, (rows(4),), None, [(rows(3),)], [(rows(1),)]),
        (loop, (rows(2, 4),), (AUTO,), [(rows(3, 4),)], [(rows(2, 6),), (rows(2, 5),)]),
        (alike, (rows(4), rows(4)), None, [(rows(3), rows(3)), (rows(1), rows(1))], [(rows(3), rows(2))]),
        (alike, (rows(4), rows(5)), None, [(rows(3), rows(2))], [(rows(3), rows(3))]),
        (twice, (rows(3), rows(6)), None, [(rows(2), rows(4))], [(rows(2), rows(5))]),
        (prefix, (rows(2, 3), rows(2, 5)), (AUTO, AUTO), [(rows(2, 3), rows(2, 0)), (rows(1, 4), rows(1, 1))], []),
        (number, (rows(4), 3), (None, Dim.DYNAMIC), [(rows(4), 1), (rows(4), 4)], [(rows(4), 5), (rows(4), 2.5)]),
        (number, (rows(4), 3), None, [(rows(4), 3)], [(rows(4), 2)]),
        (window, (rows(2, 5),), (AUTO,), [(rows(2, 12),), (rows(2, 8),), (rows(2, 1),)], []),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_calls_outside_of_the_capture_are_refused_and_all_others_right(run, example, shapes, right, refused, tmp_path):
    model = Small(run).eval()
    q = fxq.quantize(model, [example, *right], RECIPE, dynamic_shapes=shapes, progress=False)
    fxq.save(q, tmp_path / "b")
    for module in (q, fxq.load(tmp_path / "b"), fxq.optimize(q), fxq.optimize(fxq.load(tmp_path / "b"))):
        with torch.no_grad():
            for call in (example, *right):
                want, got = model(*call), module(*call)
                assert want.shape == got.shape
                assert (want - got).norm() <= 0.1 * want.norm(), [getattr(a, "shape", a) for a in call]
        for call in refused:
            with pytest.raises(InputError, match="captured for"):
                module(*call)


def test_a_loaded_exported_program_brings_its_guards_as_text(tmp_path):
    model = Small(even).eval()
    program = torch.export.export(model, (rows(4),), dynamic_shapes=({0: Dim.AUTO},))
    torch.export.save(program, tmp_path / "p.pt2")
    loaded = torch.export.load(tmp_path / "p.pt2")
    for given in (program, loaded):
        module = trace(given, (rows(4),)).module
        assert ["==", ["%", ["size", 0, 0], 2], 0] in list(rules_of(module).conditions)
        with pytest.raises(InputError, match=r"x\.shape\[0\] % 2"):
            module(rows(3))


def test_an_exported_program_has_no_model_to_try_the_sizes_0_and_1_on():
    program = torch.export.export(Small(more_than_one).eval(), (rows(4),), dynamic_shapes=({0: Dim.AUTO},))
    module = trace(program, (rows(4),)).module
    assert module(rows(2)).shape == (2, 32)
    with pytest.raises(InputError, match=r"captured for x\.shape\[0\] >= 2"):
        module(rows(1))


def test_a_condition_without_a_form_fixes_the_size_or_is_refused():
    def powers(self, x):
        return self.fc(x) * (2 if 2 ** x.shape[0] > 9 else 1)

    model = Small(powers).eval()
    with pytest.raises(TraceError, match="Pass dynamic_shapes that fix these sizes"):
        trace(model, (rows(4),), None, ({0: Dim.AUTO},))
    q = fxq.quantize(model, [rows(4)], RECIPE, progress=False)
    with pytest.raises(InputError, match=r"captured for \[4, 32\]"):
        q(rows(3))


def test_calibration_batches_outside_of_the_capture_are_named():
    with pytest.raises(fxq.CalibrationError, match=r"calibration batch 1 does not fit.*x\.shape\[0\] % 2"):
        fxq.quantize(Small(even).eval(), [rows(4), rows(3)], RECIPE, progress=False)


def test_a_model_whose_code_compares_no_size_has_no_condition():
    module = trace(Small(lambda self, x: self.fc(x).relu()).eval(), (rows(4, 3),), None, (AUTO,)).module
    assert rules_of(module).conditions == ()
