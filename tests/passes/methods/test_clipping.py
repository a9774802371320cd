import torch

from fxq.passes.methods.clipping import clips, representative


def test_few_rows_stand_for_themselves():
    rows = torch.randn(7, 5)
    flat, counts = representative(rows, None, 0)
    assert torch.equal(flat, rows.flatten()) and counts is None
    flat, counts = representative(rows, torch.arange(1.0, 8), 0)
    assert torch.equal(counts, torch.arange(1.0, 8).repeat_interleave(5))
    assert representative(rows, torch.full((7,), 3.0), 0)[1] is None


def test_ranges_reach_from_percentiles_to_extremes_that_lie_far_outside():
    flat = torch.linspace(-1, 1, 1001)
    tried = clips(flat, None, (0.9, 1.0), (-16.0, 1.0))
    assert tried[-1] == (-16.0, 1.0) and len(tried) > 2
    low, high = tried[0]
    assert abs(low + 0.8) < 0.01 and abs(high - 0.8) < 0.01
    between = sorted(low for low, _ in tried[1:])
    assert between[0] == -16.0 and all(-16 <= low < 0 for low in between)
