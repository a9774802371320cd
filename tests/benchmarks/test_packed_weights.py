"""Both layouts of 4-bit weights take turns, cold ones from copies, and are compared before."""

import pytest
import torch

from benchmarks import packed_weights
from tests.features import needs

pytestmark = needs("native")


@pytest.mark.parametrize(("rows", "copies"), [(3, 2), (65, 1)])
def test_layouts_take_turns_on_as_many_copies(rows, copies, monkeypatch):
    monkeypatch.setattr(packed_weights, "COLD_BYTES", 27_000)  # one is 13,312 in int8
    calls, asked = packed_weights.layouts(rows, 96, 70), []
    real = packed_weights.dual_scale_linear
    monkeypatch.setattr(packed_weights, "dual_scale_linear", lambda *given: asked.append(given[1]) or real(*given))
    packed, wide = (call() for call in (calls["packed"], calls["int8"]))
    assert torch.equal(packed, wide) and packed.shape == (rows, 70)
    assert [weight.dtype for weight in asked] == [torch.uint8] * copies + [torch.int8] * copies
    assert len({weight.data_ptr() for weight in asked}) == 2 * copies


def test_layouts_that_differ_are_not_measured(monkeypatch):
    results = iter(torch.eye(2))
    monkeypatch.setattr(packed_weights, "dual_scale_linear", lambda *_: next(results))
    with pytest.raises(RuntimeError, match="the layouts differ for 3 x 96 -> 70"):
        packed_weights.layouts(3, 96, 70)
