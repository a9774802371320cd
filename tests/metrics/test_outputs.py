import math

import pytest
import torch

from fxq.calibration.calibrate import Batch
from fxq.metrics.outputs import output_sqnr
from tests.toys import rows


def half_wrong(x, scale=1.0):
    return {"y": x * scale * 1.1, "count": torch.tensor(3), "more": [x * 0, None]}


def right(x, scale=1.0):
    return {"y": x * scale, "count": torch.tensor(4), "more": [x * 0, None]}


def test_a_tenth_of_error_is_twenty_decibels_whatever_the_form_of_the_item():
    x = rows(5, 3)
    for item in (x, (x,), [x, 2.0], {"x": x, "scale": 3.0}, Batch((x,), {"scale": 0.5})):
        assert output_sqnr(right, half_wrong, [item]) == pytest.approx(20, abs=1e-4)


def test_outputs_are_pooled_by_energy():
    model = lambda x: (x, 10 * x)  # noqa: E731
    worse = lambda x: (2 * x, 10 * x)  # noqa: E731
    assert output_sqnr(model, worse, [rows(7), rows(3, seed=4)]) == pytest.approx(10 * math.log10(101), abs=1e-5)


def test_equal_outputs_are_infinitely_good_and_nan_stays_visible():
    assert output_sqnr(right, right, [rows(4)]) == math.inf
    assert math.isnan(output_sqnr(right, lambda x: right(x / 0 * 0), [rows(4)]))


def test_inputs_are_left_alone():
    x = rows(4)
    kept = x.clone()
    assert output_sqnr(lambda x: x.mul_(2), lambda x: x.mul_(2), [x]) == math.inf
    assert torch.equal(x, kept)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"differ in number or shape: \[\(4,\)\] of the model, \[\(2,\)\]"):
        output_sqnr(lambda x: x, lambda x: x[:2], [rows(4)])
    for batches in ([], [torch.arange(3)]):
        with pytest.raises(ValueError, match="no batch has a floating-point output"):
            output_sqnr(lambda x: x, lambda x: x, batches)


def test_batches_that_require_gradients_or_lie_in_nests_are_copied():
    leaf = torch.ones(3, 2, requires_grad=True)
    batches = [leaf * 2, {"x": leaf * 3}, ([leaf * 4],)]

    def model(x):
        return (x[0] if isinstance(x, list) else x).mul_(2)

    assert output_sqnr(model, lambda x: model(x) + 0.5, batches) > 0
    assert torch.equal(batches[0], leaf * 2)
