import numpy as np

from fxq.report.side_by_side import GAIN, side_by_side

BAR, GAP = 20, 4


def frames(value, count=2, height=10, width=40):
    return np.full((count, height, width, 3), value, np.uint8)


def test_one_bundle_is_full_precision_bundle_and_difference_in_a_row():
    made = side_by_side(("full", frames(100)), {"b": frames(90)}, scale=2)
    assert made.dtype == np.uint8 and made.shape == (2, BAR + 20, 3 * 80 + 2 * GAP, 3)
    panels = [made[:, BAR:, i * (80 + GAP) : i * (80 + GAP) + 80] for i in range(3)]
    assert [set(panel.flatten().tolist()) for panel in panels] == [{100}, {90}, {10 * GAIN}]


def test_several_bundles_have_their_differences_under_them():
    made = side_by_side(("full", frames(100)), {"a": frames(100), "b": frames(255)})
    assert made.shape == (2, 2 * (BAR + 10), 3 * 40 + 2 * GAP, 3)
    below = made[:, BAR + 10 + BAR :]
    a, b = (below[:, :, i * (40 + GAP) : i * (40 + GAP) + 40] for i in (1, 2))
    assert not a.any() and set(b.flatten().tolist()) == {255}, (
        "no difference is black, a large one is not wrapped around"
    )


def test_names_stand_above_and_are_cut_to_fit():
    made = side_by_side(("full precision of a long name", frames(0)), {"b": frames(0)})
    bars = made[0, :BAR]
    for i in range(3):
        bar = bars[:, i * (40 + GAP) : i * (40 + GAP) + 40].astype(int)
        assert bar.max() > 150, "there is a name"
    same = side_by_side(("full precision of another name", frames(0)), {"b": frames(0)})[0, :BAR]
    assert np.array_equal(same[:, :40], bars[:, :40]), "the same first letters"
