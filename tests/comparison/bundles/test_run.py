import dataclasses
import json

import numpy as np
import pytest
import torch

from fxq.comparison.bundles import run as subject
from fxq.comparison.bundles.metrics import Metric
from fxq.comparison.bundles.run import Stage, compare_bundles
from fxq.comparison.bundles.tables import to_json
from fxq.comparison.methods import ComparisonError
from fxq.metrics.latents import psnr
from fxq.models.video.decoding import PixelDecoder
from tests.comparison.bundles.small import CHUNKS, bundle, quantized, rollout


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundles")
    return [bundle(root / "w8"), bundle(root / "w4", "w4a8-dynamic")]


def stage(**changed):
    given = {
        "name": "small", "identity": {"model": "small"}, "rollout": rollout(), "prompts": ("a cat", "a dog"),
        "decoder": lambda device: PixelDecoder(), "frames_per_second": 8.0, "suffix": ".webp",
    }  # fmt: skip
    return Stage(**(given | changed))


def test_errors_are_those_of_the_rollouts_and_more_bits_lose_less(bundles, tmp_path):
    found = compare_bundles(stage(), bundles, tmp_path, "fxq compare", progress=False)
    assert [(row.name, row.bits[:4]) for row in found.rows] == [("w8", "W8A8"), ("w4", "W4A8")]
    w8, w4 = found.rows
    assert w8.forced.shape == w8.free.shape == (2, CHUNKS)
    assert w8.median > w4.median + 10 and w8.size_ratio > w4.size_ratio
    driven = rollout()
    for i, batch in enumerate(driven.batches):
        want = driven.rollout(*batch)
        with driven.using(quantized("w4a8-dynamic")):
            got = driven.rollout(*batch)
        errors = [psnr(a, b)[0] for a, b in zip(got.split(2, 1), want.split(2, 1), strict=True)]
        assert np.allclose(w4.free[i], errors, atol=0.5)
    assert found.full.seconds.shape == (2, CHUNKS) and found.space == "pixels"
    assert [(tmp_path / clip).is_file() for clip in found.clips] == [True, True]
    assert "2 bundles beside full precision, 2 videos" in found.title
    json.dumps(to_json(found), allow_nan=False)


KNOWN = {}


@pytest.fixture
def loaded_once(monkeypatch):
    """Each bundle is loaded and optimized once for the comparisons of these tests."""
    known, load = KNOWN, subject.contestant_of

    def once(bundle, rollout):
        if bundle.path not in known:
            known[bundle.path] = load(bundle, rollout)
        return known[bundle.path]

    monkeypatch.setattr(subject, "contestant_of", once)


@pytest.mark.sweep
@pytest.mark.usefixtures("loaded_once")
def test_what_was_made_is_not_made_again_unless_something_changed(bundles, tmp_path, monkeypatch):
    first = compare_bundles(stage(), bundles[:1], tmp_path, "fxq compare", progress=False)
    made = []
    make = subject.make
    monkeypatch.setattr(subject, "make", lambda *args: made.append(args[3].name) or make(*args))
    again = compare_bundles(stage(), bundles, tmp_path, "fxq compare", progress=False)
    assert made == ["w4", "w4"]
    assert np.array_equal(again.rows[0].forced, first.rows[0].forced)
    assert np.array_equal(again.rows[0].cost.seconds, first.rows[0].cost.seconds)
    made.clear()
    other = rollout()
    other.batches = (({"prompt_embeds": torch.randn(1, 5, 12)}, other.batches[0][1]), other.batches[1])
    compare_bundles(stage(rollout=other), bundles[:1], tmp_path, "fxq compare", progress=False)
    assert made == ["full precision", "w8"], "the first video alone has another prompt"
    made.clear()
    compare_bundles(stage(identity={"model": "else"}), bundles[:1], tmp_path, "fxq compare", progress=False)
    assert made == ["full precision", "full precision", "w8", "w8"]


@pytest.mark.usefixtures("loaded_once")
def test_metrics_see_full_precision_and_every_bundle(bundles, tmp_path):
    def error(pairs):
        return max(np.abs(pair.frames.astype(int) - pair.reference).max() for pair in pairs)

    found = compare_bundles(
        stage(), bundles[:1], tmp_path, "fxq compare", [Metric("largest", "a test", error)], progress=False
    )
    assert found.full_metrics == {"largest": 0.0} and found.rows[0].metrics["largest"] > 0
    assert not list(tmp_path.glob(".frames-*"))


@pytest.mark.usefixtures("loaded_once")
def test_without_a_decoder_there_are_latents_and_no_videos(bundles, tmp_path):
    found = compare_bundles(stage(decoder=None), bundles[:1], tmp_path, "fxq compare", progress=False)
    assert found.space == "latents" and not found.clips and not (tmp_path / "videos").exists()
    with pytest.raises(
        ComparisonError, match="metrics m look at frames, and there is no decoder of latents: give --vae"
    ):
        compare_bundles(stage(decoder=None), bundles[:1], tmp_path, "", [Metric("m", "", len)], progress=False)


def test_a_decoder_of_other_latents_is_refused_before_anything_runs(bundles, tmp_path):
    class Other(PixelDecoder):
        channels = 16

    with pytest.raises(ComparisonError, match="takes latents of 16 channels, the model makes 3"):
        compare_bundles(stage(decoder=lambda device: Other()), bundles, tmp_path, "", progress=False)
    assert not list(tmp_path.iterdir())
    assert dataclasses.is_dataclass(Stage)
