import dataclasses

import numpy as np
import pytest
import torch

import fxq
from fxq.comparison.measure import UNSEEN, Bench, Extent
from fxq.comparison.methods import entries
from fxq.comparison.subject import Subject, tiny_subject
from fxq.lab import Lab, latents_of
from fxq.passes import LowRank, Rotate, Smooth
from fxq.presets import PRESETS
from fxq.runtime.progress import Progress
from tests.toys import wan_rollout

EXTENT = Extent(videos=3, calibration_videos=2)


def rollouts(videos, seed, unseen):
    return wan_rollout(tuple(range(10 * seed, 10 * seed + videos))), None


SUBJECT = Subject(name="toy", identity={}, rollouts=rollouts)


@pytest.fixture(scope="module")
def bench():
    return Bench(SUBJECT, EXTENT, 1, Progress(False))


def measured(bench, *words, bits="w4a8"):
    return [bench.measure(entry, Progress(False)) for entry in entries(words, [bits], iterations=3)]


def test_full_precision_is_measured_with_the_limits_of_its_own_latents(bench):
    found = bench.reference
    assert (found.scores, found.chunks, found.trained) == ({}, 3, 3)
    assert found.limits == (float(bench.latents.min()), float(bench.latents.max()))
    assert torch.equal(bench.latents, latents_of(rollouts(3, UNSEEN + 1, True)[0]))


@pytest.mark.parametrize(
    "method",
    ["q_arvd", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("smoothquant", "rotation", "svdquant"))],
)
def test_a_row_is_what_fxq_quantize_makes_on_the_same_calibration_videos(bench, method):
    ((variant, seconds),) = measured(bench, method)
    (entry,) = entries([method], ["w4a8"], iterations=3)
    calibration = rollouts(2, 1, False)[0]
    module = fxq.quantize(calibration.denoiser, calibration, dataclasses.replace(entry.recipe, seed=1), progress=False)
    rollout = rollouts(3, UNSEEN + 1, True)[0]
    with rollout.using(module):
        videos = latents_of(rollout)
    error = (videos - bench.latents).double().square().flatten(1).mean(1)
    assert variant.latent_mse == pytest.approx(error.numpy(), rel=1e-9)
    assert variant.chunk_mse.mean(1) == pytest.approx(variant.latent_mse)
    assert (seconds.sensitivity > 0) == (method == "q_arvd") and variant.seconds == seconds.total


def test_every_row_has_all_measures_of_its_own_module(bench):
    rows = [variant for variant, _ in measured(bench, "minmax", "nearest", "w8a8-dynamic")]
    for v in rows:
        assert v.teacher_forced.shape == v.psnr.shape == v.ssim.shape == (3,)
        assert v.forced_chunks.shape == v.chunk_mse.shape == (3, 3)
        assert (v.latent_mse > 0).all() and (v.ssim < 1).all() and v.scores == {}
        assert 0 < v.whole_ratio < 1 and v.quantized > v.kept
    by_name = {v.method: v for v in rows}
    assert (by_name["w8a8-dynamic"].teacher_forced < by_name["minmax"].teacher_forced).all()
    assert by_name["w8a8-dynamic"].whole_ratio > by_name["minmax"].whole_ratio


@pytest.mark.sweep
def test_the_shipped_model_and_its_rows_are_scored():
    bench = Bench(tiny_subject(), Extent(videos=2, calibration_videos=1), 1, Progress(False))
    ((variant, _),) = measured(bench, "minmax", bits="w8a8")
    assert set(variant.scores) == set(bench.reference.scores) >= {"shape", "colour", "motion"}
    assert bench.reference.scores["colour"] == variant.scores["colour"] == 1


@pytest.mark.sweep
def test_rows_do_not_depend_on_what_was_measured_before(bench):
    words = ("q_arvd:share_inputs=false", "minmax")
    late = measured(bench, *words)
    for word, (variant, _) in zip(words, late, strict=True):
        alone = Bench(SUBJECT, EXTENT, 1, Progress(False))
        ((again, _),) = measured(alone, word)
        assert np.array_equal(variant.latent_mse, again.latent_mse)
        assert np.array_equal(variant.forced_chunks, again.forced_chunks)


def test_another_seed_calibrates_and_measures_on_other_videos(bench):
    other = Bench(SUBJECT, EXTENT, 2, Progress(False), bench)
    assert not torch.equal(other.latents, bench.latents)
    ((a, _),), ((b, _),) = measured(bench, "minmax"), measured(other, "minmax")
    assert not np.array_equal(a.latent_mse, b.latent_mse)


def test_videos_have_the_asked_length_and_what_came_first_stays():
    longer = Bench(SUBJECT, dataclasses.replace(EXTENT, chunks=5), 1, Progress(False))
    assert (longer.reference.chunks, longer.reference.trained) == (5, 3)
    ((variant, _),) = measured(longer, "minmax")
    assert variant.chunk_mse.shape == variant.forced_chunks.shape == (3, 5)


def test_a_lab_calibrates_again_only_for_other_layers_rows_or_gradients():
    recipes = {row.method: row.recipe for row in entries(["minmax", "adaround", "least_error"], ["w4a8"])}
    lab = Lab(rollouts(2, 1, False)[0], recipes["minmax"], Progress(False))
    first = lab.collected(recipes["minmax"])
    assert lab.collected(recipes["adaround"]) is first
    assert lab.collected(dataclasses.replace(recipes["minmax"], seed=7)) is first
    smoothed, split, turned = (
        lab.collected(dataclasses.replace(recipes["minmax"], transforms=(step,)))
        for step in (Smooth(), LowRank(), Rotate())
    )
    assert smoothed is split is first and turned is not first
    layer = "blocks.0.ffn.0"
    assert not torch.allclose(turned.statistics[layer].high, first.statistics[layer].high, rtol=0.01)
    assert first.statistics[layer].multiplier is None
    weighed = lab.collected(recipes["least_error"])
    assert weighed is not first
    assert all(s.gradients is not None for s in weighed.statistics.values())
    for change in ({"max_rows": 9}, {"share_inputs": False}, {"rules": PRESETS["w4a8"].rules[-1:]}):
        assert lab.collected(dataclasses.replace(recipes["minmax"], **change)) is not first
