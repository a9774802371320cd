import dataclasses

import pytest
import torch
from torch import nn

import fxq
from fxq import numerics
from fxq.passes.methods import EXACT, output_sqnr, subsample
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.ranges import MinMax, RangeSearch
from tests.toys import problem, rows


def recipe(*methods, **scheme):
    rules = (fxq.Rule("*", fxq.Scheme(**scheme)),)
    return fxq.Recipe(name="plain", rules=rules, methods=methods or (RangeSearch(),), weighting="uniform")


def decibels(want, got):
    want, got = want.double(), got.double()
    return float(10 * torch.log10(want.square().sum() / (want - got).square().sum()))


def reported_and_real(calls, chosen=None, **options):
    """The summary's SQNR of one linear, and the one of its output on all calls."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(calls[0].shape[-1], 64, **options)).eval().requires_grad_(False)
    quantized = fxq.quantize(linear, calls, chosen or recipe(), progress=False)
    want, got = (torch.cat([made(call).flatten(0, -2) for call in calls]) for made in (linear, quantized))
    return fxq.summary(quantized).rows[0].output_sqnr, decibels(want, got)


def uneven():
    """Calls of 3 to 3000 rows of very different sizes of values, small ones first."""
    counts = (3000, 40, 300, 3, 3000, 700)
    return [rows(n, 64, seed=i) * s for i, (n, s) in enumerate(zip(counts, (0.02, 0.02, 1, 30, 0.5, 2), strict=True))]


@pytest.mark.parametrize("method", [RangeSearch(), MinMax()])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("order", ["given", "reversed"])
def test_the_reported_sqnr_is_that_of_all_calibration_data(method, per_token, order):
    calls = uneven() if order == "given" else uneven()[::-1]
    told, real = reported_and_real(calls, recipe(method, per_token=per_token))
    assert told == pytest.approx(real, abs=0.7)


def test_the_reported_sqnr_is_that_of_more_rows_than_are_kept():
    calls = [rows(256, 64, seed=i) * (0.02 if i < 40 else 1.0) for i in range(80)]
    chosen = dataclasses.replace(recipe(), max_rows=2048)
    for data in (calls, calls[::-1]):
        told, real = reported_and_real(data, chosen)
        assert told == pytest.approx(real, abs=0.7)


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_has_its_bias(bias):
    told, real = reported_and_real([rows(50, 64) * 1e-3], bias=bias)
    assert told == pytest.approx(real, abs=0.1) and (told > 70) == bias


@pytest.mark.parametrize("at", [0, 7, 500, 1500, 2999])
@pytest.mark.parametrize("size", [200, 1e4])
def test_one_huge_token_is_never_left_out(at, size):
    x = rows(1, 3000, 64)
    x[0, at] *= size
    told, real = reported_and_real([rows(1, 3000, 64, seed=8), x])
    assert told == pytest.approx(real, abs=1) and real > 8


@pytest.mark.parametrize("width", [64, pytest.param(96, marks=pytest.mark.sweep), 1536])
@pytest.mark.parametrize("channel", [0, 5, 37, 63])
def test_one_huge_channel_is_never_left_out(width, channel):
    x = rows((1 << 21) // width, width)
    x[:, channel] *= 30
    told, real = reported_and_real(list(x.split(256)))
    minmax = reported_and_real(list(x.split(256)), recipe(MinMax()))[1]
    assert real > minmax - 0.5 and told == pytest.approx(real, abs=1)


@pytest.mark.parametrize("unit", [1e-30, 1e-9, 1e9, 1e30])
@pytest.mark.parametrize("which", ["inputs", "weights"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_depends_on_units(unit, which, per_token, bits):
    p = problem(count=300, bits=bits, outliers=32, per_token=per_token)
    size = 2.0 ** round(torch.tensor(unit, dtype=torch.float64).log2().item())
    inputs, weights = (size, 1.0) if which == "inputs" else (1.0, size)
    scaled = dataclasses.replace(
        p, rows=p.rows * inputs, low=p.low * inputs, high=p.high * inputs, weight=p.weight * weights
    )
    for methods in ((MinMax(),), (RangeSearch(),), (RangeSearch(), AdaRound(iterations=20, rows=32))):
        a = b = None
        for method in methods:
            a, b = method.apply(p, a), method.apply(scaled, b)
        assert torch.equal(a.weight, b.weight) and torch.equal(a.weight_scale * weights, b.weight_scale)
        if not per_token:
            assert torch.equal(a.input_scale * inputs, b.input_scale)
            assert torch.equal(a.input_zero_point, b.input_zero_point)
        assert output_sqnr(p, a) == pytest.approx(output_sqnr(scaled, b), abs=1e-6)


def test_an_exact_output_and_a_silent_one_have_finite_numbers():
    p = problem(bits=8)
    silent = dataclasses.replace(p, rows=p.rows * 0, low=p.low * 0, high=p.high * 0)
    assert output_sqnr(silent, MinMax().apply(silent, None)) == EXACT
    update = MinMax().apply(silent, None)
    wrong = dataclasses.replace(update, input_zero_point=update.input_zero_point + 200)
    assert output_sqnr(silent, wrong) == -EXACT


def test_a_part_of_the_rows_stands_for_all():
    x = rows(20_000, 16)
    x[5] *= 3000
    x[100:200] *= 20
    weights = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 3
    index, new = subsample(x, weights, 1500, 0)
    assert len(index) == 1500 and index.tolist() == sorted(set(index.tolist())) and 5 in index.tolist()
    for values in (torch.ones(20_000), x.square().sum(1), x.square().sum(1) * (torch.arange(20_000) != 5)):
        want = float((values.double() * weights).sum())
        assert float((values[index].double() * new).sum()) == pytest.approx(want, rel=0.08)


def test_sums_over_parts_of_rows_have_no_bias():
    x = rows(300, 4)
    x[7] *= 9
    weights = torch.linspace(0.2, 2, 300)
    values = torch.linspace(1, 2, 300).double()
    want = float((values * weights).sum())
    found = []
    for seed in range(300):
        index, new = subsample(x, weights, 60, seed)
        found.append(float((values[index] * new).sum()) / want)
    assert abs(torch.tensor(found).mean() - 1) < 4 * torch.tensor(found).std() / 300**0.5


def test_few_rows_are_all_taken():
    x, weights = rows(5, 3), torch.arange(5.0)
    index, new = subsample(x, weights, 5, 0)
    assert index.tolist() == list(range(5)) and torch.equal(new, weights)


def test_tokens_too_small_for_a_normal_scale_count_as_zero_and_others_do_not():
    least = numerics.LEAST_MAGNITUDE
    x = torch.tensor([[least, least / 2], [least * 1.01, -least], [1e-30, -1e-30]])
    q, scale = fxq.kernels.quantize_per_token(x, None, 2, 8)
    want, want_scale = numerics.quantize_per_token(x, 2, 8)
    assert torch.equal(q, want) and torch.equal(scale, want_scale)
    assert q.tolist() == [[0, 0], [127, -126], [127, -127]] and scale[0] == 1.0
    assert float(scale[1:].min()) >= 2.0**-126 and bool(torch.isfinite(1 / scale).all())


def test_static_scales_are_never_subnormal_and_keep_what_their_multiples_can():
    x = torch.tensor([[0.0, 2.0**-126, -(2.0**-124), 2.0**-140]])
    p = dataclasses.replace(problem(outputs=3, width=4), rows=x, low=x[0], high=x[0], row_weights=torch.ones(1))
    p = dataclasses.replace(p, weight=torch.full((3, 4), 2.0**-124))
    for method in (MinMax(), RangeSearch()):
        update = method.apply(p, None)
        assert update.input_scale.tolist() == [2.0**-126] and set(update.weight_scale.flatten().tolist()) == {2.0**-126}
        q = numerics.quantize_input(x, update.input_scale, update.input_zero_point, 4, 8)
        back = numerics.dequantize_input(q, update.input_scale, update.input_zero_point, 4)
        assert back.tolist() == [[0.0, 2.0**-126, -(2.0**-124), 0.0]] and set(update.weight.flatten().tolist()) == {4}
