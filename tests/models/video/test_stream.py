import torch

from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny
from fxq.models.video.stream import chunks_of


def test_chunks_are_those_of_the_whole_video_and_the_module_runs_while_one_is_made():
    rollout, _ = tiny_rollout(load_tiny(), 2, seed=1, unseen=True)
    calls = []

    def counted(*args):
        calls.append(len(calls))
        return rollout.denoiser(*args)

    parts = []
    for latents in chunks_of(rollout, *rollout.batches[0], counted):
        parts.append(latents)
        assert len(calls) == 5 * len(parts), "four denoising calls and a context call a chunk, and none ahead"
        assert rollout._running is rollout.denoiser
    assert [part.shape[1] for part in parts] == [3] * 7
    assert torch.equal(torch.cat(parts, 1), rollout.rollout(*rollout.batches[0]))
