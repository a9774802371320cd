import dataclasses

from fxq.cli.play import EXAMPLE
from fxq.comparison.bundles.contestant import FULL_PRECISION


def test_longer_videos_get_a_cache_that_holds(stage, bundle):
    exact = stage.contestants[FULL_PRECISION]
    usual = stage.rollout.sampler.cache
    assert stage.loop(exact, stage.chunks).sampler.cache == usual
    assert stage.loop(exact, stage.chunks + 1).sampler.cache == stage.endless != usual
    assert dataclasses.replace(stage, endless=None).loop(exact, 100).sampler.cache == usual
    own = dataclasses.replace(stage.contestants[bundle.name], policy=stage.endless)
    assert stage.loop(own, 1).sampler.cache == stage.endless


def test_noise_is_that_of_the_seed_and_the_length(stage):
    draws = stage.draws(3, 2)
    assert draws.shape[0] == 2 * stage.rollout.sampler.frames_per_chunk
    assert draws.shape[1:] == stage.rollout.batches[0][1].shape[1:] and list(draws.seeds) == [3]
    assert stage.encode(EXAMPLE)["prompt_embeds"].shape[0] == 1


def test_bytes_of_weights_are_those_of_what_runs(stage, bundle):
    model = sum(p.numel() * p.element_size() for p in stage.rollout.model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in stage.rollout.model.buffers())
    assert stage.weight_bytes(stage.contestants[FULL_PRECISION]) == model + buffers
    assert 0 < stage.weight_bytes(stage.contestants[bundle.name]) < model / 2
