import collections
import functools
import weakref

import pytest
from torch import nn

from fxq.integrations.reach import holders


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


class Plain:
    def __init__(self, held):
        self.held = held


def with_default(x, held=None):
    return held


def with_keyword(*, held=None):
    return held


def closing_over(held):
    return lambda x: held


def with_attribute(held):
    def function():
        pass

    function.held = held
    return function


PLACES = {
    "held": lambda t: t,
    "held[1]": lambda t: [0, t],
    "held['k'][0]": lambda t: {"k": (t,)},
    "held[0]": lambda t: {t},
    "held[0][0]": lambda t: collections.deque([[t]]),
    "held.held": Plain,
    "held.held[0]": lambda t: Slotted([t]),
    "held.args[0]": lambda t: functools.partial(print, t),
    "held.keywords['x']": lambda t: functools.partial(print, x=t),
    "held.__self__": lambda t: t.forward,
    "held's variable held": closing_over,
    "held.func's variable held": lambda t: functools.partial(closing_over(t)),
    "held.__wrapped__'s variable held": lambda t: functools.cache(closing_over(t)),
    "held()": weakref.ref,
    "held's default": lambda t: lambda x, held=t: x,
    "held.held's variable held": lambda t: Plain(closing_over(t)),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_object_is_found_where_it_is_held(place):
    root, target = nn.Sequential(nn.Linear(2, 2)), nn.Linear(3, 3)
    object.__setattr__(root, "held", PLACES[place](target))
    assert [holder.path for holder in holders(root, {id(target)})[id(target)]] == [place]


def test_all_places_are_found_and_each_object_is_looked_into_once():
    root, target = nn.Module(), nn.Linear(3, 3)
    shared = [target]
    root.first, root.again, root.own, root.loop = shared, shared, target, [root]
    found = holders(root, {id(target), id(target.weight)})
    assert sorted(holder.path for holder in found[id(target)]) == ["first[0]", "own"]
    assert [holder.owner for holder in found[id(target.weight)]] == [target]


def test_hooks_and_globals_are_not_looked_into():
    root, target = nn.Linear(2, 2), nn.Linear(3, 3)
    root.register_forward_hook(closing_over(target))
    root.function = with_default
    assert holders(root, {id(target)}) == {}


def test_functions_hold_keyword_defaults_and_attributes():
    root, target = nn.Module(), nn.Linear(3, 3)
    with_keyword.__kwdefaults__["held"] = target
    root.first, root.second = with_keyword, with_attribute(target)
    try:
        paths = sorted(holder.path for holder in holders(root, {id(target)})[id(target)])
    finally:
        with_keyword.__kwdefaults__["held"] = None
    assert paths == ["first's default", "second.held"]
