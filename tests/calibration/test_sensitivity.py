import dataclasses

import pytest
import torch

import fxq
from fxq.calibration.calibrate import calibrate
from fxq.calibration.collect import Collector
from fxq.calibration.rollout import Draws
from fxq.calibration.sensitivity import chunk_sensitivity
from fxq.capture.trace import trace
from fxq.core.pipeline import run_passes
from fxq.lab import Lab, tiny_rollout
from fxq.models.tiny import load_tiny
from fxq.passes import ApplyMethods, DetectOutliers, LowerLinear, PlanLayers
from fxq.runtime.progress import Progress
from tests.toys import QUICK, recipe, wan_rollout


def naive(rollout, quantized, reference):
    """Every chunk's run from the start."""
    errors = []
    for condition, draws in rollout.batches:
        units = rollout.units(condition, draws)
        with rollout.using(reference):
            want = rollout.rollout(condition, draws)
        per_chunk = []
        for chunk in range(units):
            state = rollout.begin(condition, draws)
            for unit in range(units):
                with rollout.using(quantized if unit == chunk else reference):
                    state = rollout.advance(state)
            per_chunk.append((state.latents.double() - want.double()).square().flatten(1).mean(1))
        errors.append(torch.stack(per_chunk, dim=1))
    return torch.cat(errors)


@pytest.fixture(scope="module")
def graphs():
    rollout, chosen = wan_rollout(), recipe(4)
    args, shapes = rollout.example_call()
    graph = trace(rollout.denoiser, args, None, shapes)
    run_passes(graph, (PlanLayers(chosen), DetectOutliers()))
    calibrate(graph, rollout, None, Collector(chosen.rows_per_call, chosen.max_rows, chosen.seed))
    fork = graph.fork()
    run_passes(fork, (ApplyMethods(QUICK), LowerLinear()))
    return rollout, fork.module, graph.module


def test_forked_runs_equal_full_reruns_bit_for_bit(graphs):
    rollout, quantized, reference = graphs
    told = []
    found = chunk_sensitivity(rollout, quantized, reference, lambda *args: told.append(args))
    assert torch.equal(found.mse, naive(rollout, quantized, reference))
    assert found.mse.shape == (2, 3) and found.mse.dtype == torch.float64 and bool((found.mse > 0).all())
    assert told == [(i + 1, 9) for i in range(9)]
    torch.testing.assert_close(found.alpha, found.mse.mean(0) / found.mse.mean(0).sum())
    assert float(found.alpha.sum()) == pytest.approx(1)


def test_the_public_function_measures_the_same(graphs):
    rollout, quantized, reference = graphs
    alpha = fxq.sensitivity(rollout, dataclasses.replace(recipe(4), share_inputs=False))
    mean = naive(rollout, quantized, reference).mean(0)
    assert torch.equal(alpha, mean / mean.sum())


def test_without_an_error_every_chunk_weighs_the_same(graphs):
    rollout, _, reference = graphs
    found = chunk_sensitivity(rollout, reference, reference)
    assert not found.mse.any() and found.alpha.tolist() == pytest.approx([1 / 3] * 3)


def test_videos_of_different_length_are_refused(graphs):
    _, quantized, reference = graphs
    longer = wan_rollout()
    condition, _ = longer.batches[0]
    longer.batches = (*longer.batches, (condition, Draws((1, 2), (8, 3, 4, 6))))
    with pytest.raises(ValueError, match=r"videos of equal length, got \[3, 4\] chunks"):
        chunk_sensitivity(longer, quantized, reference)


@pytest.mark.sweep
def test_the_first_chunk_is_the_most_sensitive_and_the_last_the_least():
    """In nearly every video and twofold in the median; the mean over videos hangs on a few of them (`make demo`)."""
    model = load_tiny()
    calibration, _ = tiny_rollout(model, 4, seed=1, unseen=False)
    unseen, _ = tiny_rollout(model, 16, seed=2, unseen=True)
    lab = Lab(calibration, fxq.PRESETS["w4a8"], Progress(False))
    measured = chunk_sensitivity(unseen, lab.initialised("w4a8"))
    median = measured.mse.median(0).values
    assert (measured.mse.argmax(1) == 0).double().mean() > 0.9
    assert median[0] > 1.5 * median[1:].max()
    assert median[-1] < median[0] / 2 and median[-1] < 1.1 * median.min()
