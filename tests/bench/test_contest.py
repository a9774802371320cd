import itertools
import math
import re

import pytest
import torch

from fxq.bench.contest import BF16, EXACT, FP32, Built, Case, CaseResult, Contestant, Result, run_case, sqnr


def ticking():
    """A clock that advances by one second each time it is read."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


X = torch.arange(1.0, 13.0).reshape(3, 4)


def contestant(name, output=None, least=40.0, **options):
    value = X if output is None else output
    return Contestant(name, lambda: Built(lambda: value, "kernel of " + name), least, **options)


def broken(name, error, **options):
    def build():
        raise error

    return Contestant(name, build, 40.0, **options)


def result_of(*contestants, **options):
    case = Case("case", lambda: X, (contestant(FP32), contestant(BF16), *contestants), **options)
    return run_case(case, 5, ticking())


def only_result(*contestants, **options):
    return result_of(*contestants, **options).results[-1]


def test_a_right_contestant_gets_times_and_ratios():
    case = result_of(contestant("right"))
    result = case.results[-1]
    assert (result.status, result.kernel, len(result.seconds)) == ("ok", "kernel of right", 5)
    assert case.ratio("right", BF16).median == 1.0


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (X * 1.1, r"SQNR 20\.0 dB, expected at least 40"),
        (X.roll(1, 0), r"SQNR .* dB, expected at least 40"),
        (X[:, :3], r"output is \(3, 3\), the reference \(3, 4\)"),
        (X / 0, "SQNR -inf dB, expected at least 40"),
    ],
)
def test_a_wrong_contestant_gets_no_time(output, why):
    case = result_of(contestant("planted", output))
    result = case.results[-1]
    assert result.status == "wrong"
    assert result.refused
    assert result.seconds == ()
    assert case.ratio("planted", FP32) is None
    assert re.fullmatch(why, result.note), result.note


def test_a_contestant_that_refuses_itself_is_wrong_whatever_its_output():
    planted = Contestant("planted", lambda: Built(lambda: X, refusal="fxq::op differs"), 40.0)
    result = only_result(planted)
    assert (result.status, result.note, result.seconds) == ("wrong", "fxq::op differs", ())


def test_an_error_while_building_is_reported_and_does_not_lose_the_others():
    case = result_of(broken("broken", RuntimeError("no compiler\nlong story")), contestant("after"))
    assert [r.status for r in case.results] == ["ok", "ok", "failed", "ok"]
    assert case.results[2].note == "RuntimeError: no compiler"


def test_an_error_while_timing_is_reported_and_does_not_lose_the_others():
    count = itertools.count()

    def call():
        if next(count) > 3:
            raise MemoryError
        return X

    case = result_of(Contestant("late", lambda: Built(call), 40.0), contestant("after"))
    assert [r.status for r in case.results] == ["ok", "ok", "failed", "ok"]
    assert case.results[2].note == "MemoryError"
    assert case.results[2].seconds == ()


@pytest.mark.parametrize(("ours", "refused"), [(True, True), (False, False)])
def test_only_a_failure_of_this_library_refuses_the_run(ours, refused):
    assert only_result(broken("broken", ValueError("x"), ours=ours)).refused is refused


def test_a_missing_package_is_named_and_its_contestant_never_built():
    result = only_result(broken("rival", AssertionError("was built"), needs="no_such_package_anywhere"))
    assert (result.status, result.note) == ("skipped", "no_such_package_anywhere is not installed")
    assert not result.refused


def test_only_the_picked_part_is_compared():
    disturbed = X.clone()
    disturbed[1] = 0
    case = Case("case", lambda: X[[0, 2]], (contestant("right", disturbed),), pick=lambda y: y[[0, 2]])
    assert run_case(case, 5, ticking()).results[0].status == "ok"


def test_what_is_compared_can_differ_from_what_is_timed():
    planted = Contestant("rollout", lambda: Built(lambda: None, output=lambda: X), 40.0)
    assert only_result(planted).status == "ok"


def test_there_is_no_ratio_to_a_baseline_that_failed():
    case = Case("case", lambda: X, (broken(FP32, ValueError("x")), contestant(BF16), contestant("right")))
    found = run_case(case, 5, ticking())
    assert found.ratio("right", FP32) is None
    assert found.ratio("right", BF16) is not None


def test_sqnr_counts_signal_over_error():
    assert sqnr(X, X) == EXACT
    assert sqnr(X, X * 0.99) == pytest.approx(40.0, abs=1e-3)
    assert sqnr(X, torch.full_like(X, math.nan)) == -math.inf
    assert sqnr(X, torch.zeros_like(X)) == pytest.approx(0.0)


def test_int8_has_to_beat_the_fastest_float_and_not_itself():
    def result(name, arithmetic, seconds, status="ok"):
        return Result(name, status, arithmetic=arithmetic, seconds=seconds)

    floats = result(FP32, "float32", (3.0,) * 5), result("packed", "float32", (1.0, 9.0, 1.0, 1.0, 9.0))
    wrong, ours = result("planted", "bfloat16", (), "wrong"), result("fxq", "int8", (0.5,) * 5)
    assert CaseResult("case", {}, (*floats, wrong, ours)).fastest_float == "packed"
    assert CaseResult("case", {}, (wrong, ours)).fastest_float is None
