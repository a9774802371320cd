import dataclasses

import pytest
import torch

from fxq.cache.policy import CachePolicy
from fxq.comparison.bundles.contestant import FULL_PRECISION, Contestant
from fxq.comparison.bundles.runs import Run, make, save, saved
from tests.comparison.bundles.small import CHUNKS, rollout

FULL = Contestant(name=FULL_PRECISION)


def off(driven, chunks, amount=0.05):
    """The denoiser with its first prediction of some chunks moved; ``chunks`` by their number."""
    from fxq.calibration.rollout import current_call

    def module(*args):
        output, *rest = driven.denoiser(*args)
        call = current_call()
        if call.kind == "denoise" and call.chunk in chunks:
            output = output + amount
        return (output, *rest)

    return Contestant(name="off", module=module)


@pytest.mark.parametrize("window", [-1, 4])
def test_full_precision_from_its_own_history_makes_its_own_video(window):
    driven = rollout(window=window)
    condition, draws = driven.batches[0]
    run = make(driven, condition, draws, FULL, None)
    assert torch.equal(run.free, driven.rollout(condition, draws)[0]) and run.forced is None
    assert len(run.seconds) == CHUNKS and run.peak > 0
    again = make(driven, condition, draws, Contestant(name="same"), run.free)
    assert torch.equal(again.free, run.free) and torch.equal(again.forced, run.free)


def test_an_error_of_one_chunk_stays_in_it_from_full_precisions_history_and_goes_on_without():
    driven = rollout()
    condition, draws = driven.batches[0]
    want = make(driven, condition, draws, FULL, None).free
    run = make(driven, condition, draws, off(driven, {1}), want)
    wrong = [
        [not torch.equal(a, b) for a, b in zip(x.split(2), want.split(2), strict=True)] for x in (run.free, run.forced)
    ]
    assert wrong == [[False, True, True], [False, True, False]]
    assert torch.equal(run.free[:4], run.forced[:4])


def test_history_is_what_the_contestant_itself_makes_of_the_reference():
    driven = rollout()
    condition, draws = driven.batches[0]
    want = make(driven, condition, draws, FULL, None).free
    other = torch.randn_like(want)
    run = make(driven, condition, draws, FULL, other)
    state = driven.begin(condition, draws)
    for chunk in other.split(2)[:2]:
        state = driven.take(state, chunk[None])
    assert torch.equal(state.latents[0], other[:4])
    assert torch.equal(run.forced[4:], driven.advance(state).latents[0, 4:])
    assert not torch.equal(run.forced[4:], want[4:])


def test_a_contestant_keeps_its_own_cache_and_the_loop_gets_its_policy_back():
    driven = rollout()
    condition, draws = driven.batches[0]
    short = Contestant(name="short", policy=CachePolicy(window=2))
    before = driven.sampler
    free = make(driven, condition, draws, short, None).free
    assert driven.sampler is before
    narrow = rollout(window=2)
    assert torch.equal(free, narrow.rollout(*narrow.batches[0])[0])
    assert not torch.equal(free, driven.rollout(condition, draws)[0])

    def broken(*args):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        make(driven, condition, draws, dataclasses.replace(short, module=broken), None)
    assert driven.sampler is before


def test_a_run_is_read_again_unless_it_is_of_something_else(tmp_path):
    run = Run(free=torch.randn(4, 2, 3, 3), forced=torch.randn(4, 2, 3, 3), seconds=(0.5, 0.25), peak=12)
    path = tmp_path / "deep" / "run.safetensors"
    save(path, run, "this")
    again = saved(path, "this")
    assert torch.equal(again.free, run.free) and torch.equal(again.forced, run.forced)
    assert (again.seconds, again.peak) == (run.seconds, run.peak)
    assert saved(path, "that") is None and saved(tmp_path / "none", "this") is None
    save(path, dataclasses.replace(run, forced=None), "this")
    assert saved(path, "this").forced is None
    path.write_bytes(path.read_bytes()[:50])
    assert saved(path, "this") is None
