import pytest
import torch

from fxq.comparison.methods import ComparisonError
from fxq.comparison.subject import chunks_of, tiny_subject, with_chunks
from fxq.lab import latents_of, object_scores, tiny_rollout
from fxq.metrics import sprites
from fxq.models.tiny import load_tiny
from tests.metrics.test_latents import doubling


@pytest.fixture(scope="module")
def subject():
    return tiny_subject(batch=2)


def test_prompts_to_measure_on_are_none_of_the_training(subject):
    for unseen in (False, True):
        rollout, conditions = subject.rollouts(3, 5, unseen)
        assert [len(draws.seeds) for _, draws in rollout.batches] == [2, 1]
        assert (sprites.held_out(conditions) == unseen).all()


def test_longer_videos_have_a_window_of_the_trained_length_and_relative_positions(subject):
    rollout, _ = subject.rollouts(1, 5, True)
    longer = with_chunks(rollout, 9)
    assert chunks_of(rollout) == 7 and chunks_of(longer) == 9
    policy = longer.sampler.cache
    assert (policy.window, policy.sink, policy.positions) == (21, 3, "relative")
    assert latents_of(longer).shape == (1, 27, 3, 20, 20)
    assert rollout.sampler.cache.window == -1


def test_a_window_of_the_model_stays(subject):
    rollout, _ = subject.rollouts(1, 5, True)
    assert with_chunks(with_chunks(rollout, 9), 12).sampler.cache == with_chunks(rollout, 9).sampler.cache


def test_shorter_videos_are_the_first_chunks(subject):
    rollout, _ = subject.rollouts(1, 5, True)
    short = with_chunks(rollout, 2)
    assert short.sampler.cache == rollout.sampler.cache and latents_of(short).shape[1] == 6


def test_a_rollout_that_is_not_chunk_by_chunk_keeps_its_length():
    with pytest.raises(ComparisonError, match="--chunks: Doubling decides about the length"):
        with_chunks(doubling(), 3)


def test_long_videos_are_scored_chunk_by_chunk():
    rollout, conditions = tiny_rollout(load_tiny(), 2, seed=3, unseen=True)
    video = latents_of(rollout)
    assert object_scores(video, conditions) == sprites.score(video, conditions).means()
    twice = object_scores(torch.cat([video, video], 1), conditions)
    chunks = [sprites.score(chunk, conditions).means()["shape"] for chunk in video.split(3, dim=1)]
    assert twice["shape"] == pytest.approx(sum(chunks) / len(chunks))
