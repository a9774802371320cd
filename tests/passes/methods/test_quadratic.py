import dataclasses

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from fxq import cpu, numerics
from fxq.passes import methods
from fxq.passes.methods import Units, descent, gptq, moments, output_sqnr, quadratic, simulated_input
from fxq.passes.methods.descent import CoordinateDescent
from fxq.passes.methods.gptq import GPTQ
from fxq.passes.methods.quadratic import Quadratic, cholesky, reordered
from fxq.passes.methods.ranges import MinMax, RangeSearch
from fxq.passes.methods.refit import RefitScales
from tests.toys import problem, rows, steps

METHODS = (GPTQ(), CoordinateDescent(), RefitScales())


def weighted(p, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return dataclasses.replace(p, row_weights=torch.rand(len(p.rows), generator=generator) + 0.1)


def dequantized(p, update):
    return numerics.dequantize_weight(update.weight, update.weight_scale, p.split)


def output_error(p, update, weight):
    """The weighted squared error of each output by its definition, its mean taken out, float64 [N]."""
    x, q = p.rows.double(), simulated_input(p, update, p.rows).double()
    w = p.row_weights.double() / p.row_weights.double().sum()
    error = x @ p.weight.double().T - q @ weight.double().T
    return w @ (error - w @ error).square()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("outliers", [0, 32])
def test_the_form_is_the_output_error_up_to_a_constant(outliers, per_token):
    p = weighted(problem(outliers=outliers, count=20_000, per_token=per_token))
    update, units = RangeSearch().apply(p, None), Units.of(p)
    form = Quadratic.of(p, update)
    generator = torch.Generator().manual_seed(0)
    weights = [dequantized(p, update) + 0.05 * torch.randn(p.weight.shape, generator=generator) for _ in range(3)]
    real = torch.stack([output_error(p, update, weight) for weight in weights])
    told = torch.stack([form.loss(weight / units.weights).double() for weight in weights])
    told *= (units.inputs * units.weights) ** 2
    torch.testing.assert_close((real[1:] - real[0]) / real[0], (told[1:] - told[0]) / real[0], atol=5e-3, rtol=0)


def test_no_linear_map_of_the_quantized_input_is_better_than_the_target():
    p = weighted(problem(count=400, input_bits=4))
    update = RangeSearch().apply(p, None)
    form = Quadratic.of(p, update)
    best = form.loss(form.target)
    for seed in range(3):
        noise = torch.randn(p.weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.01
        assert bool((form.loss(form.target + noise) > best).all())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(("bits", "input_bits", "outliers"), [(4, 8, 0), (4, 8, 32), (8, 8, 32), (4, 4, 0)])
def test_every_output_is_at_least_as_good_as_before(method, bits, input_bits, outliers):
    p = weighted(problem(bits=bits, input_bits=input_bits, outliers=outliers, count=500))
    before = RangeSearch().apply(p, None)
    after = method.apply(p, before)
    form, unit = Quadratic.of(p, before), Units.of(p).weights
    old, new = (form.loss(u.weight * steps(p, u.weight_scale / unit)) for u in (before, after))
    assert bool((new <= old * (1 + 1e-5)).all()) and float(new.sum()) < 0.8 * float(old.sum())
    assert output_sqnr(p, after) > output_sqnr(p, before)
    low, high = numerics.integer_range(bits)
    assert after.weight.dtype == torch.int8 and int(after.weight.min()) >= low and int(after.weight.max()) <= high
    assert torch.equal(after.input_scale, before.input_scale)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_the_mean_output_is_right(method):
    p = weighted(problem(count=300, input_bits=3))
    p = dataclasses.replace(p, rows=p.rows + 0.7)
    update = method.apply(p, RangeSearch().apply(p, None))
    w = p.row_weights / p.row_weights.sum()
    got = simulated_input(p, update, p.rows) @ dequantized(p, update).T + update.bias_shift
    torch.testing.assert_close(w @ got, w @ (p.rows @ p.weight.T), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("unit", [1e-30, 1e-3, 1e18])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_nothing_has_a_unit(method, unit):
    p = problem(outliers=32, count=300)
    power = 2.0 ** round(torch.tensor(unit).log2().item())
    scaled = dataclasses.replace(p, rows=p.rows * power, low=p.low * power, high=p.high * power)
    a, b = (method.apply(q, MinMax().apply(q, None)) for q in (p, scaled))
    assert torch.equal(a.weight, b.weight) and torch.equal(a.weight_scale, b.weight_scale)
    torch.testing.assert_close(a.bias_shift * power, b.bias_shift)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_what_is_not_to_be_reconstructed_passes_unchanged(method):
    p = problem(reconstruct=False)
    update = RangeSearch().apply(p, None)
    assert method.apply(p, update) is update
    empty = dataclasses.replace(problem(), rows=p.rows[:0], row_weights=p.row_weights[:0])
    assert method.apply(empty, update) is update
    with pytest.raises(ValueError, match="put RangeSearch or MinMax first"):
        method.apply(problem(), None)


def test_the_form_is_made_once_for_the_scales_it_was_made_for():
    p = problem(input_bits=4)
    a, b = RangeSearch((0.99,)).apply(p, None), MinMax().apply(p, None)
    first = Quadratic.of(p, a)
    assert Quadratic.of(p, GPTQ().apply(p, a)) is first
    assert Quadratic.of(p, b) is not first
    assert not dataclasses.replace(p, seed=1).cache


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_rows_of_one_value_and_dead_channels_do_no_harm(method):
    p = problem(count=300)
    x = p.rows.clone()
    x[:, 5:40] = 0
    x[:, 50] = 3.0
    p = dataclasses.replace(p, rows=x, low=x.amin(0), high=x.amax(0))
    before = RangeSearch().apply(p, None)
    after = method.apply(p, before)
    assert bool(after.weight_scale.isfinite().all() and after.bias_shift.isfinite().all())
    assert output_sqnr(p, after) >= output_sqnr(p, before)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_the_sums_of_both_groups_still_fit(method):
    p = problem(outliers=32, count=300)
    x = p.rows.clone()
    x[:, -32:] *= 3e4
    p = dataclasses.replace(p, rows=x, low=x.amin(0), high=x.amax(0))
    update = method.apply(p, RangeSearch().apply(p, None))
    scale = update.input_scale[:, None] * update.weight_scale
    assert float((scale[1] / scale[0]).max()) <= numerics.ratio_limit(p.weight.shape[1], p.split)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_integer_is_within_a_step_of_its_weight(method, bits):
    p = weighted(problem(bits=bits, outliers=32, count=40))
    update = method.apply(p, RangeSearch().apply(p, None))
    step = steps(p, update.weight_scale)
    low, high = numerics.integer_range(bits)
    inside = (p.weight / step > low) & (p.weight / step < high)
    assert float(((update.weight - p.weight / step).abs() * inside).max()) < 1 + 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_few_rows_alike_do_not_spoil_the_others(bits):
    """Rows of a few directions, then rows of others: what calibration did not see is about as good as it was."""
    p = problem(bits=bits, count=3000, outputs=40)
    generator = torch.Generator().manual_seed(1)
    seen = torch.randn(3000, 5, generator=generator) @ torch.randn(5, 96, generator=generator)
    seen += 1e-3 * torch.randn(seen.shape, generator=generator)
    p = dataclasses.replace(p, rows=seen, low=seen.amin(0), high=seen.amax(0))
    nearest = RangeSearch().apply(p, None)
    update = nearest
    for method in METHODS:
        update = method.apply(p, update)
    other = dataclasses.replace(p, rows=rows(3000, 96))
    gain = 2 if bits == 4 else 0.3  # at 8 bits the rounding of inputs is most of the error
    assert output_sqnr(p, update) > output_sqnr(p, nearest) + gain
    assert output_sqnr(other, update) > output_sqnr(other, nearest) - 1.65


@pytest.mark.parametrize("value", [0.3, 1.1, 7.3, 100.0])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_rows_that_are_all_equal_say_nothing_of_weights_and_all_of_the_mean(method, value):
    p = problem(count=16, width=64)
    x = torch.full((16, 64), value) * (1 + torch.arange(64) % 3)
    p = dataclasses.replace(p, rows=x, low=x.amin(0), high=x.amax(0))
    before = RangeSearch().apply(p, None)
    form = Quadratic.of(p, before)
    assert not form.gram.sub(form.gram.diag().diag()).any()
    after = method.apply(p, before)
    assert output_sqnr(p, after) > 100  # by the shift alone


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_inputs_that_hardly_vary_about_a_large_value_have_the_form_of_their_variation(offset):
    p = problem(count=400, width=64, per_token=True)
    moved = dataclasses.replace(p, rows=p.rows + offset, low=p.low + offset, high=p.high + offset)
    x = simulated_input(moved, RangeSearch().apply(moved, None), moved.rows).double()
    want = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    got = Quadratic.of(moved, RangeSearch().apply(moved, None)).gram.double()
    units = Units.of(moved).inputs
    off = ~torch.eye(64, dtype=torch.bool)
    torch.testing.assert_close(got[off] * units**2, want[off], rtol=1e-3, atol=1e-4 * float(want.diagonal().mean()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_an_error_and_no_endless_search(value):
    gram = torch.eye(4, dtype=torch.float64)
    gram[2, 2] = value
    with pytest.raises(ValueError, match="sums of squares of a layer's inputs are not finite"):
        cholesky(gram, 0.0)
    assert torch.equal(cholesky(torch.zeros(4, 4), 0.0).isfinite(), torch.ones(4, 4, dtype=torch.bool))


@pytest.mark.parametrize(("most", "size"), [(4096, 8), (0, 4)], ids=["float64", "float32"])
def test_two_matrices_of_the_inputs_are_in_memory_at_most(most, size, monkeypatch):
    monkeypatch.setattr(quadratic, "DOUBLE", most)
    monkeypatch.setattr(moments, "_STRIP", 32)
    width = 320
    p = problem(outputs=8, width=width, count=64, outliers=32)
    update = RangeSearch().apply(p, None)
    for method in METHODS:
        with LiveBytes() as live:
            update = method.apply(p, update)
        assert live.peak < 2.6 * size * width**2
        assert live.live < 1.2 * 4 * width**2  # the form stays for the next method


def test_of_weights_seven_copies_are_in_memory_at_most(monkeypatch):
    monkeypatch.setattr(moments, "_STRIP", 64)
    for module in (gptq, descent):
        monkeypatch.setattr(module, "BLOCK", 16)
    p = problem(outputs=2048, width=160, count=64, outliers=32)
    update = RangeSearch().apply(p, None)
    for method in METHODS:
        with LiveBytes() as live:
            update = method.apply(p, update)
        assert live.peak < 7 * p.weight.nbytes + 2 * 8 * 160**2


def test_rows_are_quantized_by_parts(monkeypatch):
    p = problem(outputs=8, width=64, count=9000, outliers=32)
    p = dataclasses.replace(p, rows=p.rows * 8, low=p.low * 8, high=p.high * 8)  # in another unit than one
    update = RangeSearch().apply(p, None)
    with LiveBytes() as live:
        form = Quadratic.of(p, update)
    assert live.peak < 3.2 * 4096 * 64 * 4
    monkeypatch.setattr(methods, "_PART", 7)
    again = Quadratic.of(dataclasses.replace(p, seed=1), update)
    assert torch.equal(again.gram, form.gram) and torch.equal(again.target, form.target)


@pytest.mark.parametrize("strip", [16, 40])
def test_strips_change_nothing_but_memory(strip, monkeypatch):
    p = weighted(problem(outputs=50, outliers=32, count=300))
    first = RangeSearch().apply(p, None)

    def solved(given):
        update = first
        for method in METHODS:
            update = method.apply(given, update)
        return update

    want = solved(p)
    monkeypatch.setattr(moments, "_STRIP", strip)
    got = solved(dataclasses.replace(p, seed=1))
    assert torch.equal(got.weight, want.weight)
    # Without AVX512 the sums of MKL follow the sizes of what is multiplied.
    rtol = 1e-6 if cpu.above_avx2() else 1e-5
    torch.testing.assert_close(got.weight_scale, want.weight_scale, rtol=rtol, atol=0)


def test_a_factor_in_another_order_is_that_of_the_reordered_matrix():
    gram = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    gram, order = gram @ gram.T, torch.randperm(40, generator=torch.Generator().manual_seed(1))
    before = gram.clone()
    factor = cholesky(gram, 0.01, order)
    want = gram[order][:, order] + 0.01 * gram.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(factor @ factor.T, want)
    assert not factor.triu(1).any() and torch.equal(gram, before)
    assert torch.equal(reordered(gram, order), gram[order][:, order])
