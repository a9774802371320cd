import math

import pytest

from fxq.comparison.reliability import Reliability, bits_of, order_agreement, variation


def test_variation_is_deviation_over_mean():
    assert variation([1.0, 3.0]) == pytest.approx(1 / 2)  # mean 2, deviation 1
    assert variation([2.0, 4.0, 6.0], sample=True) == pytest.approx(2 / 4)
    assert variation([5.0, 5.0]) == 0 and variation([-1.0, -3.0]) == pytest.approx(1 / 2)
    assert all(math.isnan(v) for v in (variation([]), variation([1.0], sample=True), variation([-1.0, 1.0])))


def test_agreement_is_the_share_of_methods_whose_widths_come_in_order():
    errors = {
        "in order": {"W4A6": 3.0, "W8A8": 1.0, "W4A8": 2.0},
        "swapped": {"W8A8": 1.0, "W4A8": 3.0, "W4A6": 2.0},
        "equal": {"W8A8": 1.0, "W4A8": 1.0},
        "no better than full precision": {"W8A8": 0.0, "W4A8": 1.0},
        "one width": {"W8A8": 1.0},
        "of its own": {"MIXED": 1.0, "W8A8": 2.0},
    }
    assert order_agreement(errors, 0.0, lower=True) == pytest.approx(1 / 4)
    assert order_agreement({"a": {"W8A8": 0.9, "W4A8": 0.8}}, 1.0, lower=False) == 1
    assert order_agreement({"a": {"W8A8": 0.9, "W4A8": 0.8}}, 0.85, lower=False) == 0
    assert math.isnan(order_agreement({"one width": {"W8A8": 1.0}}, 0.0, lower=True))


def test_widths_are_ordered_by_bits_of_weights_then_of_inputs():
    assert bits_of("W4A8") == (4, 8) and bits_of("w16a16") == (16, 16)
    assert bits_of("mixed") is None and bits_of("w4a8-dynamic") is None


def test_both_at_once_are_their_product():
    found = Reliability(metric="psnr", cv=0.5, boa=0.25, between_seeds=math.nan)
    assert found.ds == 0.125
    assert math.isnan(Reliability(metric="psnr", cv=0.5, boa=math.nan, between_seeds=0.0).ds)
