import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxq
from fxq.capture.trace import trace
from fxq.core.ir import Stage
from fxq.core.pipeline import run_passes
from fxq.passes import DetectOutliers, PlanLayers
from tests.core.test_verify import at
from tests.toys import recipe, rows, toy


def weight_with(planted, width, outputs=24, seed=0, factor=6.0):
    weight = torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed))
    weight[:, planted] *= factor
    return weight


def by_formula(weight, tau, alpha, align):
    """The rule in numpy, independent of the library."""
    v = np.linalg.norm(weight.numpy().astype(np.float64), axis=0)
    median = np.median(v)
    mad = np.median(np.abs(v - median))
    raw = int((v > max(median + tau / 0.6745 * mad, alpha * median)).sum()) if mad >= 1e-8 else 0
    align = min(align, v.size)
    count = min(int(np.ceil(raw / align)) * align, v.size // 2 // align * align)
    return raw, count, set(np.argsort(-v, kind="stable")[:count].tolist()), median, mad


@given(
    seed=st.integers(0, 2**30),
    width=st.integers(3, 200),
    planted=st.integers(0, 60),
    tau=st.sampled_from([2.5, 3.5, 4.5]),
    alpha=st.sampled_from([1.1, 1.2, 1.3]),
    align=st.sampled_from([1, 32, 64]),
)
def test_the_rule_agrees_with_an_independent_implementation(seed, width, planted, tau, alpha, align):
    weight = weight_with(list(range(min(planted, width))), width, seed=seed)
    found = fxq.detect_outliers(weight, tau, alpha, align)
    raw, count, channels, median, mad = by_formula(weight, tau, alpha, align)
    assert (found.raw_count, found.count, set(found.indices.tolist())) == (raw, count, channels)
    assert found.median == pytest.approx(median, rel=1e-5) and found.mad == pytest.approx(mad, rel=1e-3, abs=1e-5)
    assert found.count % min(align, width) == 0 and found.count <= width / 2
    assert found.indices.tolist() == sorted(found.indices.tolist())


@given(seed=st.integers(0, 2**30), exponent=st.sampled_from([-110, -70, -10, 10, 60, 110]))
def test_scaling_the_weight_changes_nothing(seed, exponent):
    weight = weight_with([3, 17, 90], 128, seed=seed)
    a, b = fxq.detect_outliers(weight), fxq.detect_outliers(weight * 2.0**exponent)
    assert torch.equal(a.indices, b.indices) and b.threshold == pytest.approx(a.threshold * 2.0**exponent)


@given(seed=st.integers(0, 2**30))
def test_permuting_channels_permutes_the_outliers(seed):
    weight = weight_with([1, 5, 40], 96, seed=seed)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(seed))
    a, b = fxq.detect_outliers(weight), fxq.detect_outliers(weight[:, order])
    assert set(order[b.indices].tolist()) == set(a.indices.tolist())


def test_a_uniform_weight_has_no_outliers():
    assert fxq.detect_outliers(torch.ones(8, 128)).count == 0
    assert fxq.detect_outliers(torch.zeros(8, 128)).count == 0


def test_planted_outliers_are_found():
    planted = [2, 30, 31, 77, 100]
    found = fxq.detect_outliers(weight_with(planted, 128))
    assert found.raw_count == 5 and found.count == 32
    assert set(planted) <= set(found.indices.tolist())
    assert found.norms.shape == (128,) and found.norms.dtype == torch.float32


def test_more_outliers_than_half_the_channels_are_capped():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 160, generator=generator) * torch.logspace(0, 4, 160)
    assert fxq.detect_outliers(weight).raw_count > 32
    assert fxq.detect_outliers(weight, align=64).count == 64


def test_bfloat16_weights_are_measured_in_float32():
    weight = weight_with([4], 96).bfloat16()
    assert fxq.detect_outliers(weight).median == fxq.detect_outliers(weight.float()).median


@pytest.mark.parametrize(
    ("weight", "align", "message"),
    [
        (torch.ones(3), 32, r"needs a weight \[N, K\], got shape \(3,\)"),
        (torch.full((3, 64), torch.nan), 32, "the weight has NaN or infinity"),
        (torch.ones(3, 64), 0, "align = 0, expected at least 1"),
    ],
)
def test_what_is_no_weight_is_refused(weight, align, message):
    with pytest.raises(ValueError, match=message):
        fxq.detect_outliers(weight, align=align)


def reasons(model, width, **scheme):
    graph = trace(model, (rows(3, width),))
    run_passes(graph, (PlanLayers(recipe(**scheme)), DetectOutliers()))
    return {layer: (len(plan.outliers), plan.outlier_reason) for layer, plan in graph.quantized_plans.items()}


def test_plans_carry_the_outliers_or_why_there_are_none():
    assert reasons(toy(), 96) == {
        "blocks.0.up": (32, ""),
        "blocks.0.down": (0, "no channel above the threshold"),
    }
    assert reasons(toy(), 96, dual_scale=False)["blocks.0.up"] == (0, "dual scale is off in the recipe")
    assert reasons(toy(width=50), 50)["blocks.0.up"] == (0, "in_features 50 is not a multiple of 32")
    narrow = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(32, 9))).eval()
    narrow[0][0].weight.data[:, 5] *= 9
    assert reasons(narrow, 32)["0.0"] == (0, "half of 32 channels is less than one block of 32")


def test_a_layer_has_two_scales_wherever_it_lies():
    for model, name in ((torch.nn.Sequential(torch.nn.Linear(96, 40)), "0"), (torch.nn.Linear(96, 40), "")):
        weight = dict(model.named_parameters())[f"{name}.weight".lstrip(".")]
        weight.data[:, 7] *= 9
        ((layer, (count, reason)),) = reasons(model.eval(), 96).items()
        assert (count, reason) == (32, ""), layer


def test_the_planned_graph_names_outliers_in_ascending_order():
    plan = at(Stage.PLANNED).plans["blocks.0.up"]
    assert list(plan.outliers) == sorted(plan.outliers) and set(range(3, 35, 4)) <= set(plan.outliers)
