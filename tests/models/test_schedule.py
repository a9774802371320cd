import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq.cache.policy import CachePolicy
from fxq.models.schedule import FlowSchedule
from fxq.models.self_forcing import SamplerConfig


def test_warped_steps_are_those_of_self_forcing():
    warped = FlowSchedule().warp((1000, 750, 500, 250))
    assert warped == pytest.approx((1000, 937.5, 833.33, 625), abs=5e-3)


def test_the_grid_goes_from_1_to_the_official_last_sigma():
    schedule = FlowSchedule()
    assert schedule.sigmas[0] == 1
    assert schedule.sigmas[-1].item() == pytest.approx(0.00498, abs=5e-6)
    assert (schedule.sigmas.diff() < 0).all()
    assert schedule.sigmas.dtype == torch.float32
    assert torch.equal(schedule.timesteps, schedule.sigmas * 1000)


def test_step_0_maps_to_timestep_0_and_the_smallest_sigma():
    schedule = FlowSchedule()
    assert schedule.warp((0,)) == (0.0,)
    assert schedule.sigma(torch.zeros(1)) == schedule.sigmas[-1].double()


@given(shift=st.floats(1, 12), step=st.integers(1, 1000))
def test_sigma_of_a_warped_step_is_the_closed_form(shift, step):
    schedule = FlowSchedule(shift=shift)
    (timestep,) = schedule.warp((step,))
    u = step / 1000
    assert schedule.sigma(torch.tensor(timestep)).item() == pytest.approx(shift * u / (1 + (shift - 1) * u), rel=1e-5)


@given(timesteps=st.lists(st.floats(0, 1000), min_size=2, max_size=2))
def test_x0_recovers_what_renoise_mixed(timesteps):
    schedule = FlowSchedule()
    x0, noise = torch.randn(2, 1, 3, 4, 5), torch.randn(2, 1, 3, 4, 5)
    t = torch.tensor(timesteps).unsqueeze(1)
    noisy = schedule.renoise(x0, noise, t)
    torch.testing.assert_close(schedule.x0(noisy, noise - x0, t), x0, atol=1e-6, rtol=1e-5)


def test_a_model_that_predicts_x0_is_taken_at_its_word():
    output = torch.randn(1, 2, 3, 4, 4)
    assert FlowSchedule(prediction="x0").x0(torch.randn_like(output), output, torch.zeros(1, 2)) is output


def test_renoising_bfloat16_does_not_round_sigma():
    schedule = FlowSchedule()
    x0, noise = torch.randn(1, 1, 1, 64, 64).bfloat16(), torch.randn(1, 1, 1, 64, 64).bfloat16()
    t = torch.tensor([[schedule.warp((500,))[0]]])
    sigma = schedule.sigma(t).float()
    exact = ((1 - sigma) * x0.float() + sigma * noise.float()).bfloat16()
    mixed = schedule.renoise(x0, noise, t)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, exact)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'epsilon': expected 'flow' or 'x0'"):
        FlowSchedule(prediction="epsilon")


def test_the_first_chunk_may_have_steps_of_its_own():
    sampler = SamplerConfig(steps=[1000, 500], first_chunk_steps=[1000, 750, 500, 250])
    assert len(sampler.timesteps(True)) == 4
    assert sampler.timesteps(False) == pytest.approx((1000, 833.33), abs=5e-3)
    assert SamplerConfig(steps=(1000, 757), warp=False).timesteps(True) == (1000.0, 757.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": ()}, "steps is empty"),
        (
            {"cache": CachePolicy(window=5, sink=3)},
            "window of 5 frames cannot hold 3 sink frames and a chunk of 3; .* at least 6",
        ),
    ],
)
def test_impossible_sampler_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**settings)
