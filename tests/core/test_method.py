import dataclasses

import pytest

from fxq.core.method import LearningMethod, is_method
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.ranges import MinMax, RangeSearch


@dataclasses.dataclass(frozen=True)
class Ours:
    """A method of someone else: a dataclass with ``apply``, and nothing to inherit from."""

    strength: float = 1.0

    def apply(self, problem, update):
        return update


@dataclasses.dataclass(frozen=True)
class OursLearns(Ours):
    iterations: int = 7
    rows: int = 64


@pytest.mark.parametrize("method", [MinMax(), RangeSearch(), AdaRound(), Ours(), OursLearns()])
def test_a_dataclass_with_apply_is_a_method(method):
    assert is_method(method) and not is_method(type(method))


def test_methods_that_say_how_many_steps_they_take_learn():
    methods = (MinMax(), RangeSearch(), AdaRound(iterations=5), Ours(), OursLearns())
    assert [m.iterations for m in methods if isinstance(m, LearningMethod)] == [5, 7]
