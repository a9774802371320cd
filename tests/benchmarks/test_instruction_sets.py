"""Each instruction set multiplies the same operands in turns, and its library is put back."""

import pytest
import torch

from benchmarks import instruction_sets
from fxq.kernels import native
from tests.features import needs

pytestmark = needs("native")


def test_every_set_of_this_cpu_and_torch_take_turns():
    before = native.library
    calls = instruction_sets.contestants(3, 96, 70)
    assert native.name() in calls and "bf16 eager" in calls
    assert ("bf16 oneDNN, packed" in calls) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    taken = instruction_sets.seconds({name: calls[name] for name in (native.name(), "bf16 eager")}, rounds=2)
    assert [len(times) for times in taken.values()] == [2, 2] and native.library is before


def test_sets_that_differ_are_not_measured(monkeypatch):
    results = iter(torch.eye(len(instruction_sets.build.SETS)))
    monkeypatch.setattr(instruction_sets.build, "load", lambda target: None)
    monkeypatch.setattr(instruction_sets.cpu, "missing", lambda needs: ())
    monkeypatch.setattr(instruction_sets, "dual_scale_linear", lambda *_: next(results))
    with pytest.raises(RuntimeError, match="the instruction sets differ for 3 x 96 -> 70"):
        instruction_sets.contestants(3, 96, 70)
