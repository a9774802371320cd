import dataclasses

import numpy as np
import pytest
import torch

from fxq.calibration.rollout import Call, Draws, Rollout, Span, State, current_call
from fxq.metrics.latents import forced_chunks, mean_of_calls, teacher_forced


class Doubling(Rollout):
    """Two calls a chunk, of the kinds given; latents are what the first returns."""

    kinds = ("denoise", "context")

    def units(self, condition, draws):
        return 2

    def begin(self, condition, draws):
        return State(condition, draws, 0, draws.noise[:, :0])

    def advance(self, state, on_call=None):
        unit = state.next_unit
        x = state.draws.noise[:, unit : unit + 1]
        for step, kind in enumerate(self.kinds):
            call = Call(2 * unit + step, kind, (Span(unit, step, (unit, unit + 1), 0.0),), 1)
            output = self.call(call, x, on_call=on_call)
        return dataclasses.replace(state, next_unit=unit + 1, latents=torch.cat((state.latents, output), 1))

    def example_call(self):
        return (self.batches[0][1].noise[:, :1],), None


def doubling():
    return Doubling(torch.nn.Identity(), [({}, Draws((1, 2), (2, 1, 3, 3)))])


def test_only_denoising_calls_are_measured():
    seen = []

    def off_by_two(x):
        seen.append(x)
        return x + 2

    found = teacher_forced(doubling(), {"off": off_by_two, "same": lambda x: x})
    assert len(seen) == 2  # one of two calls in each of two chunks
    assert np.allclose(found["off"], 4) and np.array_equal(found["same"], np.zeros(2))


def test_a_rollout_without_denoising_calls_is_refused():
    rollout = doubling()
    rollout.kinds = ("context",)
    with pytest.raises(ValueError, match="Doubling makes no call of kind 'denoise'"):
        teacher_forced(rollout, {"same": lambda x: x})


def test_errors_of_chunks_are_those_of_their_own_calls():
    def off_in_the_second_chunk(x):
        return x + 3.0 * (current_call().chunk == 1)

    errors, calls = forced_chunks(doubling(), {"off": off_in_the_second_chunk})
    assert np.allclose(errors["off"], [[0, 9], [0, 9]]) and np.array_equal(calls, np.ones((2, 2)))
    assert np.allclose(teacher_forced(doubling(), {"off": off_in_the_second_chunk})["off"], 4.5)


def test_chunks_weigh_as_many_times_as_they_have_calls():
    errors, calls = np.array([[1.0, 5.0], [2.0, 2.0]]), np.array([[3.0, 1.0], [0.0, 4.0]])
    assert mean_of_calls(errors, calls).tolist() == [2.0, 2.0]
