import pytest
import torch

import fxq
from fxq.parallel import ParallelError, UlyssesWan, local_rollout, ulysses
from fxq.parallel.groups import Place
from tests.parallel import jobs
from tests.parallel.models import wan
from tests.toys import recipe, toy


def assert_same(results, want):
    """Latents on every rank, and the caches of the ranks' heads side by side."""
    for result in results:
        torch.testing.assert_close(result["latents"], want["latents"], rtol=1e-5, atol=1e-5)
    for name in ("keys", "values"):
        got = [torch.cat(parts, dim=2) for parts in zip(*(result[name] for result in results), strict=True)]
        torch.testing.assert_close(got, want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 4},
        {"bits": 8, "per_token": True},
        {"bits": 4, "per_token": True, "asymmetric": True},
    ],
    ids=str,
)
def test_a_quantized_video_is_that_of_one_process(options, two_ranks, tmp_path):
    rollout = wan(frames=6)
    module = fxq.quantize(rollout.denoiser, rollout, recipe(**options), progress=False)
    folder = str(fxq.save(module, tmp_path / "bundle"))
    want = jobs.video(rollout, fxq.apply(rollout.model, module))
    assert_same(two_ranks.run(jobs.by_tokens, folder), want)


@pytest.mark.sweep
def test_a_video_in_floats_is_that_of_one_process(two_ranks):
    rollout = wan()
    assert_same(two_ranks.run(jobs.in_floats), jobs.video(rollout, rollout.model))


@pytest.mark.parametrize("size", [1, 2, 3, 6, 9, 18])
def test_every_token_gets_the_modulation_of_its_frame(size):
    frames, per_frame = 3, 6
    found = []
    for rank in range(size):
        model = UlyssesWan.__new__(UlyssesWan)
        torch.nn.Module.__init__(model)
        model.place = Place("0", rank, size)
        mine, index = model._tokens(frames * per_frame, frames)
        stretch = (mine.stop - mine.start) // len(index)
        found += index.repeat_interleave(stretch).tolist()
    assert found == [token // per_frame for token in range(frames * per_frame)]


def test_tokens_that_cannot_be_split_evenly_are_refused():
    rollout = wan(heads=4)
    model = UlyssesWan(rollout.model, Place("0", 0, 4))
    with pytest.raises(ParallelError, match=r"18 tokens \(3 frames of 6\) cannot be split evenly over 4 ranks"):
        jobs.video(local_rollout(rollout, 4), model)


def test_heads_that_cannot_be_split_evenly_are_refused():
    rollout = wan()
    with pytest.raises(ParallelError, match="2 heads cannot be split evenly over 3 ranks"):
        UlyssesWan(rollout.model, Place("0", 0, 3))
    with pytest.raises(ParallelError, match="2 heads cannot be split evenly over 3 ranks"):
        local_rollout(rollout, 3)


def test_other_models_are_refused():
    with pytest.raises(ParallelError, match="the model is Toy, expected CausalWan"):
        ulysses(toy())


def test_a_local_rollout_starts_with_the_caches_of_a_rank_and_leaves_the_other_as_it_was():
    rollout = wan()
    local = local_rollout(rollout, 2)
    state = local.begin(*local.batches[0])
    assert [tuple(cache.shape) for cache in state.cache.prefix()[0]] == [(2, 0, 1, 48)]
    assert rollout.model.config.num_heads == 2 and rollout.begin(*rollout.batches[0]).cache.prefix()[0][0].shape[2] == 2
