import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Call, Draws, current_call
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout

CONFIG = CausalWanConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=16, text_dim=10, text_len=5, in_dim=3, out_dim=3
)
SHAPE = (6, 3, 4, 6)


def toy(seeds=(1, 2), sampler=None, given_frames=0):
    torch.manual_seed(0)
    model = CausalWan(CONFIG).eval().requires_grad_(False)
    condition = {"prompt_embeds": torch.randn(len(seeds), 4, 10)}
    if given_frames:
        condition["initial_latent"] = torch.randn(len(seeds), given_frames, *SHAPE[1:])
    sampler = sampler or SamplerConfig(steps=(1000, 500), frames_per_chunk=2)
    return SelfForcingRollout(model, [(condition, Draws(seeds, SHAPE))], sampler)


def coarse(model):
    """The same network with weights rounded to few levels, a stand-in for a quantized one."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            step = module.weight.abs().max() / 7
            module.weight.copy_((module.weight / step).round() * step)
    return model


@given(seed=st.integers(0, 2**40), chunk=st.integers(0, 30), step=st.integers(0, 8))
def test_draws_are_a_pure_function_of_seed_chunk_and_step(seed, chunk, step):
    first, again = Draws([seed], (2, 1, 2, 2)), Draws([seed], (2, 1, 2, 2))
    _ = again.noise, again.renoise(chunk + 1, step, 2)
    torch.rand(3)
    draw = first.renoise(chunk, step, 2)
    assert torch.equal(draw, again.renoise(chunk, step, 2))
    for other in ((chunk + 1, step), (chunk, step + 1)):
        assert not torch.equal(draw, first.renoise(*other, 2))
    assert not torch.equal(draw, Draws([seed + 1], (2, 1, 2, 2)).renoise(chunk, step, 2))


@pytest.mark.parametrize("kind", ["step", "", "Denoise"])
def test_a_call_of_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match=f"kind {kind!r}: expected one of denoise, context, given, recache"):
        Call(3, kind, (), 1)


def test_draws_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    _ = Draws([3], SHAPE).noise, Draws([3], SHAPE).renoise(1, 1, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_a_sample_does_not_depend_on_its_batch():
    both, one = Draws([7, 9], SHAPE), Draws([9], SHAPE)
    assert torch.equal(both.noise[1:], one.noise)
    assert torch.equal(both.renoise(2, 1, 2)[1:], one.renoise(2, 1, 2))
    assert both.noise.dtype == torch.float32
    assert both.noise.shape == (2, *SHAPE)


@pytest.mark.parametrize(
    "sampler", [None, SamplerConfig(steps=(1000, 500), frames_per_chunk=2, cache=CachePolicy(window=4, sink=1))]
)
@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_fork_equals_the_full_run_bit_by_bit(chunk, sampler):
    rollout = toy(sampler=sampler)
    condition, draws = rollout.batches[0]
    other = coarse(rollout.denoiser)
    units = rollout.units(condition, draws)

    state, forks = rollout.begin(condition, draws), []
    for _ in range(units):
        forks.append(rollout.fork(state))
        state = rollout.advance(state)
    plain = state.latents

    state = rollout.begin(condition, draws)
    for unit in range(units):
        with rollout.using(other if unit == chunk else rollout.denoiser):
            state = rollout.advance(state)

    forked = forks[chunk]
    with rollout.using(other):
        forked = rollout.advance(forked)
    while forked.next_unit < units:
        forked = rollout.advance(forked)

    assert torch.equal(forked.latents, state.latents)
    assert not torch.equal(forked.latents, plain)
    assert torch.equal(forked.latents[:, : 2 * chunk], plain[:, : 2 * chunk])
    assert all(torch.equal(a, b) for a, b in zip(forked.cache.prefix()[0], state.cache.prefix()[0], strict=True))


def test_calls_are_published_in_order_with_a_context_call_per_chunk():
    rollout = toy(given_frames=2)
    seen, published = [], []
    model = rollout.denoiser

    def watching(*args):
        published.append(current_call())
        return model(*args)

    with rollout.using(watching):
        latents = rollout.rollout(*rollout.batches[0], on_call=lambda call, _: seen.append(call))
    assert published == seen
    assert current_call() is None
    assert [c.index for c in seen] == list(range(len(seen)))
    assert [(c.kind, c.chunk, c.spans[0].step) for c in seen] == [
        ("given", 0, 0),
        *((kind, chunk, step) for chunk in (1, 2, 3) for step, kind in enumerate(("denoise", "denoise", "context"))),
    ]
    assert [c.spans[0].frames for c in seen[-3:]] == [(6, 8)] * 3
    assert {c.tokens_per_frame for c in seen} == {6}
    assert latents.shape == (2, 8, *SHAPE[1:])
    assert torch.equal(latents[:, :2], rollout.batches[0][0]["initial_latent"])


def test_a_rollout_may_stop_early():
    rollout = toy()
    condition, draws = rollout.batches[0]
    assert torch.equal(rollout.rollout(condition, draws, upto=2), rollout.rollout(condition, draws)[:, :4])


def test_using_restores_the_denoiser_after_an_error():
    rollout = toy()
    with pytest.raises(ZeroDivisionError), rollout.using(lambda *_: 1 / 0):
        rollout.rollout(*rollout.batches[0])
    assert current_call() is None
    rollout.rollout(*rollout.batches[0], upto=1)


def test_an_exported_denoiser_runs_every_call_of_the_rollout():
    rollout = toy(sampler=SamplerConfig(steps=(1000, 500), frames_per_chunk=2, cache=CachePolicy(window=4, sink=1)))
    args, dynamic_shapes = rollout.example_call()
    exported = torch.export.export(rollout.denoiser, args, dynamic_shapes=dynamic_shapes).module()
    condition, draws = rollout.batches[0]
    eager = rollout.rollout(condition, draws)
    with rollout.using(exported):
        torch.testing.assert_close(rollout.rollout(condition, draws), eager, atol=1e-6, rtol=1e-6)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="no \\(condition, draws\\) batch"):
        SelfForcingRollout(CausalWan(CONFIG), [])
    rollout = toy()
    condition, draws = rollout.batches[0]
    with pytest.raises(ValueError, match=r"shape \(2, 4, 9\), expected \[2, tokens, 10\]"):
        rollout.begin({"prompt_embeds": condition["prompt_embeds"][..., :9]}, draws)
    with pytest.raises(ValueError, match="6 tokens, the model takes at most 5"):
        rollout.begin({"prompt_embeds": torch.zeros(2, 6, 10)}, draws)
    with pytest.raises(ValueError, match="0 given and 5 generated frames are not whole chunks of 2"):
        rollout.units(condition, Draws([1, 2], (5, 3, 4, 6)))
