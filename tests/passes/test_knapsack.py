import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.passes.knapsack import Choice, KnapsackError, choose, hull

NUMBERS = st.one_of(st.integers(0, 20).map(float), st.integers(0, 99).map(lambda n: n / 7))
GROUPS = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=3), min_size=1, max_size=6)


def every(groups):
    return [Choice.of(groups, picks) for picks in itertools.product(*(range(len(group)) for group in groups))]


@settings(max_examples=200)
@given(groups=GROUPS, share=st.floats(0, 1), states=st.sampled_from([1, 2, 20_000]))
def test_the_choice_is_that_of_trying_all_or_its_gap_says_how_far_it_can_be(groups, share, states):
    known = every(groups)
    limit = known[int(share * (len(known) - 1))].weight
    best = min(choice.cost for choice in known if choice.weight <= limit)
    found = choose(groups, limit, states)
    assert found == Choice.of(groups, found.options, found.gap) and found.weight <= limit
    assert best <= found.cost <= best + found.gap + 1e-9 * max(1.0, best)
    if states > len(known):
        assert found.gap <= 1e-9 * max(1.0, best)
    assert choose(groups, limit, states) == found


@settings(max_examples=100)
@given(groups=GROUPS)
def test_nothing_is_below_the_hull_which_goes_from_the_lightest_to_the_least_cost(groups):
    known, corners = every(groups), hull(groups)
    assert corners[0].weight == min(choice.weight for choice in known)
    assert corners[-1].cost == pytest.approx(min(choice.cost for choice in known))
    for a, b in itertools.pairwise(corners):
        assert a.weight <= b.weight and a.cost >= b.cost
    for corner in corners:
        assert all(c.weight > corner.weight or c.cost >= corner.cost * (1 - 1e-12) - 1e-12 for c in known)


@given(groups=GROUPS, share=st.floats(0, 1))
def test_no_equal_option_of_all_groups_is_better(groups, share):
    size = min(map(len, groups))
    groups = [group[:size] for group in groups]
    lightest = sum(min(w for w, _ in group) for group in groups)
    limit = max(lightest, *(Choice.of(groups, [i] * len(groups)).weight for i in range(size))) * (0.5 + share)
    limit = max(limit, math.fsum(min(w for w, _ in group) for group in groups))
    found = choose(groups, limit, 1)
    for i in range(size):
        uniform = Choice.of(groups, [i] * len(groups))
        assert uniform.weight > limit or found.cost <= uniform.cost


def test_of_equal_costs_the_lighter_is_chosen():
    assert choose([[(4, 1.0), (2, 1.0)], [(3, 0.0), (3, 0.0)]], 100).options == (1, 0)


def test_a_limit_that_nothing_meets_is_refused_with_the_least():
    with pytest.raises(KnapsackError, match=r"the least possible is 5, the limit 4\.9"):
        choose([[(2, 0.0), (4, 0.0)], [(3, 0.0)]], 4.9)


def test_no_groups_cost_nothing():
    assert choose([], 0) == Choice((), 0.0, 0.0, 0.0) and len(hull([])) == 1


def test_hundreds_of_layers_are_solved_exactly():
    sizes = [1 + (7 * i) % 13 for i in range(300)]
    groups = [
        [(s * 4096.0, s * (1.0 + (i * i) % 29)), (s * 8192.0, s * 0.01), (s * 16384.0, 0.0)]
        for i, s in enumerate(sizes)
    ]
    found = choose(groups, 1.25 * sum(group[0][0] for group in groups))
    assert found.gap == 0
