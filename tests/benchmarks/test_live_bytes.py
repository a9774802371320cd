import torch

from benchmarks.live_bytes import LiveBytes


def test_what_is_made_is_counted_while_it_lives_and_views_are_not():
    x = torch.zeros(1000)
    with LiveBytes() as made:
        y = x + 1
        z = (y.view(10, 100)[2:] * 2).sum()
        del y
        w = torch.empty(100)
    assert (made.largest, made.live) == (4000, 404)
    assert made.peak == 4000 + 3200 + 4
    del z, w
    assert made.live == 0
