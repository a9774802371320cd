"""Conditions on calls as data: what they say, and that nothing else passes for one."""

import pytest
import torch

from fxq.calls.conditions import (
    DEEPEST,
    MOST_PARTS,
    ConditionError,
    check_conditions,
    evaluator,
    holds,
    shown_inputs,
    text,
)

RANKS = [2, None]
LEAVES = [torch.zeros(6, 5), 3]
SIZE, OTHER, VALUE = ["size", 0, 0], ["size", 0, 1], ["value", 1]


@pytest.mark.parametrize(
    ("condition", "met", "shown"),
    [
        (["==", ["%", SIZE, 2], 0], True, "(x.shape[0] % 2) == 0"),
        (["!=", SIZE, 6], False, "x.shape[0] != 6"),
        (["<=", ["+", SIZE, OTHER], 10], False, "(x.shape[0] + x.shape[1]) <= 10"),
        (["<", ["-", SIZE, OTHER], 2], True, "(x.shape[0] - x.shape[1]) < 2"),
        ([">=", ["*", VALUE, 2], ["max", SIZE, OTHER]], True, "(n * 2) >= max(x.shape[0], x.shape[1])"),
        ([">", ["//", OTHER, 2], ["min", VALUE, 2]], False, "(x.shape[1] // 2) > min(n, 2)"),
        (["==", ["ceil", ["/", OTHER, 2]], 3], True, "ceil(x.shape[1] / 2) == 3"),
        (["==", ["floor", ["/", OTHER, 2]], ["trunc", 2.5]], True, "floor(x.shape[1] / 2) == trunc(2.5)"),
        (["and", [">", SIZE, 1], [">", OTHER, 1], ["==", VALUE, 4]], False, None),
        (["or", ["==", VALUE, 4], ["not", ["==", SIZE, 5]]], True, None),
        (["==", ["%", SIZE, ["-", VALUE, 3]], 0], False, None),
        (["==", ["float", VALUE], 3.0], True, "float(n) == 3.0"),
    ],
)
def test_a_condition_is_evaluated_and_written_as_python_would(condition, met, shown):
    assert check_conditions([condition], RANKS) == [condition]
    assert holds(evaluator(condition), LEAVES) is met
    assert shown is None or text(condition, ["x", "n"]) == shown


def test_a_message_says_what_the_inputs_are():
    condition = [">", ["*", SIZE, OTHER], VALUE]
    assert shown_inputs(condition, ["x", "n"], LEAVES) == "x of shape [6, 5], n = 3"


def nested(depth):
    expression = SIZE
    for _ in range(depth):
        expression = ["+", expression, 1]
    return ["==", expression, 0]


@pytest.mark.parametrize(
    "bad",
    [
        5,
        SIZE,
        ["+", SIZE, 1],
        ["==", SIZE],
        ["==", SIZE, "6"],
        ["==", SIZE, True],
        ["==", SIZE, None],
        ["==", ["size", 0, 2], 1],
        ["==", ["size", 0, -1], 1],
        ["==", ["size", 2, 0], 1],
        ["==", ["size", 1, 0], 1],
        ["==", ["value", 0], 1],
        ["==", ["value", True], 1],
        ["==", ["**", SIZE, 9], 1],
        ["==", ["__import__", "os"], 1],
        ["==", [["size"], 0, 0], 1],
        ["==", [], 1],
        ["and", ["==", SIZE, 1]],
        nested(DEEPEST + 1),
        nested(100_000),
        ["and", *[["==", SIZE, 1]] * MOST_PARTS],
    ],
    ids=range(21),
)
def test_what_is_no_condition_is_refused(bad):
    with pytest.raises(ConditionError):
        check_conditions([bad], RANKS)


def test_conditions_are_a_list():
    for bad in ({}, "==", None, [["==", SIZE, 1]] * 5000):
        with pytest.raises(ConditionError, match="expected a list"):
            check_conditions(bad, RANKS)
