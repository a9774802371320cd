import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq.calibration.row_sample import RowSample, measure, row_limit, strata
from tests.toys import rows


def sample(limit=200, per_call=32):
    return RowSample(limit, per_call, lambda shape, dtype: torch.empty(shape, dtype=dtype))


def fill(calls, limit=200, per_call=32, order=None, seed=0):
    made = sample(limit, per_call)
    for place in order or range(len(calls)):
        made.add(calls[place], measure(calls[place])[2], place, place, seed)
    return made


def energy(x):
    return x.double().square().sum(1)


def test_all_rows_are_kept_with_weight_one_where_there_is_room():
    calls = [rows(n, 5, seed=n) for n in (3, 17, 30)]
    kept, chunks, weights, _ = fill(calls).finish()
    assert torch.equal(kept, torch.cat(calls)) and torch.equal(weights, torch.ones(50))
    assert chunks.tolist() == [0] * 3 + [1] * 17 + [2] * 30


@given(
    counts=st.lists(st.integers(1, 90), min_size=1, max_size=12), limit=st.integers(1, 120), per_call=st.integers(1, 40)
)
def test_the_sample_is_bounded_and_its_weights_count_every_row(counts, limit, per_call):
    kept, chunks, weights, _ = fill([rows(n, 3, seed=n) for n in counts], limit, per_call).finish()
    assert 1 <= len(kept) == len(chunks) == len(weights) <= limit
    assert float(weights.sum()) == pytest.approx(sum(counts), rel=1e-5) and bool((weights > 0).all())


def spiky(calls=40, count=300, seed=0):
    """Calls of which a few rows are 200 times larger than the others."""
    made = [rows(count, 8, seed=seed + 100 + i) for i in range(calls)]
    for i in (0, 3, calls - 1):
        made[i][(7 * i + 11) % count] *= 200
    return made


@pytest.mark.parametrize("at", [0, 7, 150, 299])
def test_one_huge_row_is_always_there_and_stands_for_itself(at):
    calls = [rows(300, 8, seed=i) for i in range(20)]
    calls[13][at] *= 200
    kept, _, weights, _ = fill(calls).finish()
    largest = int(energy(kept).argmax())
    assert torch.equal(kept[largest], calls[13][at]) and float(weights[largest]) == pytest.approx(1)


def test_weighted_sums_are_those_of_all_rows():
    for calls in (spiky(), [rows(n, 8, seed=n) * s for n, s in ((4000, 1.0), (20, 30.0), (20, 0.01), (300, 3.0))]):
        kept, _, weights, _ = fill(calls).finish()
        want = float(energy(torch.cat(calls)).sum())
        assert float((energy(kept) * weights).sum()) == pytest.approx(want, rel=0.12)


def test_weighted_sums_have_no_bias():
    calls = [rows(n, 4, seed=n) * s for n, s in ((500, 1.0), (40, 1.9), (90, 0.6))]
    calls[0][::5] += 0.5
    want = float(energy(torch.cat(calls)).sum())
    found = []
    for seed in range(300):
        kept, _, weights, _ = fill(calls, 60, 32, seed=seed).finish()
        found.append(float((energy(kept) * weights).sum()) / want)
    found = torch.tensor(found)
    assert abs(float(found.mean()) - 1) < 4 * float(found.std()) / 300**0.5 + 0.005


def test_neither_the_order_of_calls_nor_who_saw_them_matters():
    calls = spiky()
    want = fill(calls).finish()
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(3)).tolist()
    again = fill(calls, order=order).finish()
    first, second = (fill(calls, order=order[i::2]) for i in (0, 1))
    states = [{name: t.clone() for name, t in s.state().items()} for s in (first, second)]
    first.merge(states[1])
    empty = sample()
    for state in states:
        empty.merge(state)
    for other in (again, first.finish(), empty.finish()):
        assert all(torch.equal(a, b) for a, b in zip(want, other, strict=True))


def test_every_call_has_the_same_share_of_rows_alike():
    calls = [rows(n, 64, seed=i) for i, n in enumerate([32] * 20 + [3200] * 20)]
    _, chunks, weights, _ = fill(calls, 400).finish()
    large = chunks >= 20
    assert 0.35 < large.float().mean() < 0.65
    assert float(weights[large].mean() / weights[~large].mean()) == pytest.approx(100, rel=0.5)


@pytest.mark.parametrize("unit", [1e-30, 1e-20, 1.0, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strata_follow_the_size_of_rows_in_any_unit(unit, dtype):
    x = (rows(6, 64) * torch.tensor([1.0, 0.0, 1e-3, 1e3, 1.0, 1e3])[:, None] * unit).to(dtype)
    low, high, norms = measure(x)
    assert torch.equal(low, x.float().amin(0)) and torch.equal(high, x.float().amax(0))
    found = strata(norms)
    assert len({int(found[i]) for i in (0, 1, 2, 3)}) == 4
    assert found[1] < found[2] < found[0] < found[3] and abs(int(found[4] - found[0])) <= 1


def test_the_default_dtype_does_not_matter():
    calls = spiky(6)
    want = fill(calls).finish()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            got = fill(calls).finish()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(want, got, strict=True))


@given(st.integers(1, 100_000))
def test_narrow_inputs_keep_more_rows_and_none_keeps_few(width):
    limit = row_limit(width)
    assert 16384 <= limit <= 65536 and limit >= row_limit(width + 1)
    assert limit in (16384, 65536) or (limit * width <= 24 << 20 < (limit + 1) * width)
