import pytest
import torch

from fxq.runtime.timing import Ratio, clock_for, interleave, ratio, repeats, settings


class FakeClock:
    """Time that passes only when a contestant spends it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spender(self, *seconds, log=None, name=""):
        """A call that takes the given seconds in turn, for ever."""
        state = {"i": 0}

        def call():
            if log is not None:
                log.append(name)
            self.now += seconds[state["i"] % len(seconds)]
            state["i"] += 1

        return call


def test_contestants_take_turns_and_each_round_starts_with_another():
    clock, log = FakeClock(), []
    interleave({name: clock.spender(1.0, log=log, name=name) for name in "abc"}, 4, clock)
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"


def test_every_contestant_is_timed_once_a_round_by_its_own_seconds():
    clock = FakeClock()
    timing = interleave({"a": clock.spender(1.0, 3.0), "b": clock.spender(0.25)}, 5, clock)
    assert timing.seconds == {"a": [1.0, 3.0, 1.0, 3.0, 1.0], "b": [0.25] * 5}


def test_a_sample_of_several_calls_gives_seconds_per_call():
    clock = FakeClock()
    timing = interleave({"a": clock.spender(1.0, 3.0)}, 3, clock, {"a": 4})
    assert timing.seconds == {"a": [2.0, 2.0, 2.0]}


def test_a_contestant_that_raises_is_dropped_and_the_others_go_on():
    clock, calls = FakeClock(), []

    def breaks():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")

    timing = interleave({"a": breaks, "b": clock.spender(1.0)}, 5, clock)
    assert timing.seconds == {"b": [1.0] * 5}
    assert str(timing.failures["a"]) == "out of luck"
    assert len(calls) == 2


@pytest.mark.parametrize(("seconds", "count"), [(0.5, 1), (0.02, 1), (0.003, 7), (1e-6, 1000), (0.0, 1000)])
def test_short_calls_are_repeated_until_a_sample_is_long_enough(seconds, count):
    clock = FakeClock()
    assert repeats(clock.spender(seconds), clock, least=0.02) == count


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_times():
    # The machine gets four times slower half way: the ratio is 2 in every round.
    assert ratio([2.0, 2.0, 8.0, 8.0, 8.0], [1.0, 1.0, 4.0, 4.0, 4.0]) == Ratio(2.0, 2.0, 2.0)


def test_the_spread_of_a_ratio_is_its_quartiles():
    assert ratio([5.0, 1.0, 3.0, 2.0, 4.0], [1.0] * 5) == Ratio(3.0, 2.0, 4.0)
    assert str(Ratio(3.0, 2.0, 4.126)) == "3.00x (2.00-4.13)"


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0, 3.0]), ([], [])])
def test_rounds_that_do_not_pair_are_refused(a, b):
    with pytest.raises(ValueError, match="expected the same number, at least 2"):
        ratio(a, b)


def test_one_thread_is_measured_in_cpu_time_and_several_by_the_wall():
    assert clock_for(1, "cpu")[0] == "cpu"
    assert clock_for(3, "cpu")[0] == "wall"


def test_settings_hold_inside_and_are_undone():
    before = torch.get_num_threads()
    with settings(before + 1):
        assert torch.get_num_threads() == before + 1
        assert not torch.is_grad_enabled()
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()
