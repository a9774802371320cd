"""What a graph may be called with, as data."""

import math

import pytest
import torch
from torch.utils import _pytree as pytree

from fxq.calls.rules import CallRules, InputError, bind, flatten

FACTS = {
    "inputs": [[None, 4], {"value": 2}, {"type": "int"}, {"text": "torch.float32"}, None],
    "dtypes": ["float32", None, None, None, None],
    "conditions": [["==", ["%", ["size", 0, 0], ["value", 2]], 0]],
}
NAMES = ["x", "count", "n", "dtype", "extra"]
CALL = [torch.ones(6, 4), 2, 3, torch.float32, object()]


def changed(**values):
    return [values.get(name, value) for name, value in zip(NAMES, CALL, strict=True)]


def test_rules_pass_through_json_and_accept_what_they_describe():
    rules = CallRules.from_json(FACTS, NAMES)
    assert rules.to_json() == FACTS
    rules.check(CALL)
    rules.check(changed(x=torch.ones(8, 4), n=4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": torch.ones(6, 5)}, r"input x has shape \[6, 5\], the graph was captured for \[any, 4\]"),
        ({"x": torch.ones(6)}, r"input x has shape \[6\]"),
        ({"x": [[1.0] * 4]}, r"input x is \[\[1.0, 1.0, 1.0, 1.0\]\], the graph was captured for a tensor"),
        ({"x": CALL[0].double()}, "input x is float64, the graph was captured for float32: convert it"),
        ({"x": CALL[0].long()}, "input x is int64, the graph was captured for float32"),
        ({"count": 3}, "input count is 3, the graph was captured for 2"),
        ({"count": 2.0}, r"input count is 2\.0"),
        ({"count": True}, "input count is True"),
        ({"count": torch.tensor(2)}, r"input count is a tensor of shape \[\]"),
        ({"n": 2.0}, r"input n is 2\.0, the graph was captured for any int"),
        ({"n": True}, "input n is True, the graph was captured for any int"),
        ({"dtype": torch.float64}, r"input dtype is torch\.float64, the graph was captured for torch\.float32"),
        ({"dtype": "torch.float32"}, "input dtype is 'torch.float32'"),
        ({"n": 4}, r"captured for \(x\.shape\[0\] % n\) == 0; this call has x of shape \[6, 4\], n = 4: a branch"),
        ({"n": 0}, r"captured for \(x\.shape\[0\] % n\) == 0"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_by_name(values, message):
    with pytest.raises(InputError, match=message):
        CallRules.from_json(FACTS, NAMES).check(changed(**values))


def test_a_captured_nan_is_equal_to_itself():
    rules = CallRules(("g",), [{"value": math.nan}], (None,))
    rules.check([math.nan])
    with pytest.raises(InputError):
        rules.check([0.0])


def test_facts_of_older_versions_state_sizes_alone():
    rules = CallRules.from_json({"inputs": FACTS["inputs"]}, NAMES)
    rules.check(changed(x=torch.ones(7, 4).double()))
    with pytest.raises(InputError, match="captured for"):
        rules.check(changed(x=torch.ones(7, 3)))


@pytest.mark.parametrize(
    "damage",
    [
        {"inputs": "x"},
        {"inputs": FACTS["inputs"][:4]},
        {"inputs": [[-1, 4], *FACTS["inputs"][1:]]},
        {"inputs": [[True, 4], *FACTS["inputs"][1:]]},
        {"inputs": [{"type": "complex"}, *FACTS["inputs"][1:]]},
        {"inputs": [{"value": 1, "type": "int"}, *FACTS["inputs"][1:]]},
        {"inputs": [{"value": [1]}, *FACTS["inputs"][1:]]},
        {"dtypes": ["float32"]},
        {"dtypes": ["save", None, None, None, None]},
        {"dtypes": [32, None, None, None, None]},
        {"conditions": {"a": 1}},
        {"conditions": 7},
        {"conditions": [["==", ["size", 9, 0], 1]]},
    ],
    ids=lambda damage: str(damage)[:60],
)
def test_damaged_facts_are_refused(damage):
    with pytest.raises(ValueError, match="facts"):
        CallRules.from_json(FACTS | damage, NAMES)


SPEC = pytree.tree_structure(((1, [2, 3]), {"c": {"a": 4, "b": 5}}))


def test_arguments_may_come_by_name_and_nested_keys_in_any_order():
    args, kwargs = bind(["x", "y", "c"], SPEC, (1,), {"c": {"b": 5, "a": 4}, "y": [2, 3]})
    assert flatten(args, kwargs, SPEC) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1,), {"c": {"a": 4, "b": 5}}, r"missing \['y'\]"),
        ((1, [2, 3]), {"c": {"a": 4, "b": 5}, "d": 0}, r"unknown \['d'\]"),
        ((1, [2, 3], {"a": 4, "b": 5}, 9), {}, "4 positional"),
        ((1, [2, 3, 9]), {"c": {"a": 4, "b": 5}}, "nested in another way"),
        ((1, [2]), {"c": {"a": 4, "b": 5}}, "nested in another way"),
        ((1, [2, 3]), {"c": {"a": 4, "z": 5}}, "nested in another way"),
        ((1, 2), {"c": {"a": 4, "b": 5}}, "nested in another way"),
        (([1], [2, 3]), {"c": {"a": 4, "b": [5, 6]}}, "nested in another way"),
    ],
)
def test_other_names_and_other_nesting_are_refused(args, kwargs, message):
    with pytest.raises(InputError, match=message):
        flatten(*bind(["x", "y", "c"], SPEC, args, kwargs), SPEC)
