"""What a rollout knows of its absorbed layers comes back from tensors and facts, and what does not fit is refused."""

import dataclasses
import json

import pytest
import torch

from fxq.cache.absorb import Absorb, Absorption
from fxq.cache.compress import Few
from fxq.cache.saved import SavedCacheError
from fxq.cache.saved_absorption import PREFIX, absorption_from_tensors, absorption_to_tensors
from tests.cache.test_absorb import driven, normal

LAYERS = [(0.5, 0.01), (1.0, 10.0), (0.1, 0.01), (0.5, 0.5)]


def begun(settings, priors=()):
    return Absorption.begin(settings, len(LAYERS), 2, torch.zeros(2, 0, 2, 6), priors)


def made(chunks, settings=None, priors=()):
    """What is known after so many chunks."""
    settings = settings or Absorb()
    found = dataclasses.replace(driven(settings, LAYERS, chunks), priors=tuple(priors))
    if settings.tokens and found.converted:
        stands = Few(normal(2, 3, 2, 6), normal(2, 3, 2, 6, seed=1), normal(2, 3, 2))
        found = dataclasses.replace(
            found, few=tuple(stands if i in found.converted else f for i, f in enumerate(found.few))
        )
    return found


def read(found, unit, change=None, priors=()):
    tensors, facts = absorption_to_tensors(found)
    tensors |= {PREFIX + name: tensor for name, tensor in (change or {}).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    facts = json.loads(json.dumps(facts))
    back = absorption_from_tensors(tensors, facts, begun(found.settings, priors), unit, found.converted)
    assert not tensors
    return back


def assert_same(a, b):
    if torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    else:
        assert a == b


@pytest.mark.parametrize("chunks", [0, 3, 4, 5, 6])
@pytest.mark.parametrize("form", ["full", "per_head"])
def test_it_comes_back_as_it_was(chunks, form):
    found = made(chunks, Absorb(form=form))
    assert bool(found.verdicts) == (chunks >= 5)
    assert_same(read(found, chunks), found)


def test_tokens_come_back_without_the_maps_that_nothing_reads():
    found = made(5, Absorb(tokens=4))
    back = read(found, 5)
    assert back.converted == found.converted == (0, 2) and not any(bool(m.any()) for m in back.maps)
    assert_same(back.few, found.few)


def test_a_ridge_that_leaves_no_verdict_comes_back_too():
    found = made(5)
    odd = tuple(dataclasses.replace(v, left=float("nan")) for v in found.verdicts)
    back = read(dataclasses.replace(found, verdicts=odd), 5)
    assert all(v.left != v.left for v in back.verdicts) and back.converted == found.converted


def test_other_priors_are_refused():
    priors = [normal(1, 1, 12, 12, seed=i) for i in range(4)]
    found = made(3, priors=priors)
    assert_same(read(found, 3, priors=priors), found)
    for other in ((), [prior + 1 for prior in priors]):
        with pytest.raises(SavedCacheError, match="other priors than this one's"):
            read(found, 3, priors=other)
    with pytest.raises(SavedCacheError, match="facts are damaged"):
        absorption_from_tensors({}, "x", begun(Absorb()), 3, ())


BROKEN = torch.full((2, 1, 12, 12), torch.nan)
WRONG = {
    "a sum is missing": (
        3,
        {"gram.1": None},
        r"\.gram\.1 is missing: expected torch.float64 \(2, 1, 12, 12\)",
    ),
    "a sum of another dtype": (3, {"cross.0": torch.zeros(2, 1, 12, 12)}, r"absorption\.cross\.0 is torch.float32"),
    "a map of another shape": (5, {"map.0": torch.zeros(2, 1, 12, 11)}, r"absorption\.map\.0 is .* \(2, 1, 12, 11\)"),
    "a map is missing": (5, {"map.2": None}, r"absorption\.map\.2 is missing"),
    "a map of no numbers": (5, {"map.0": BROKEN}, r"absorption\.map\.0 holds NaN"),
    "no verdicts": (5, {"scores": None}, r"absorption\.scores is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_by_name(name):
    unit, change, message = WRONG[name]
    with pytest.raises(SavedCacheError, match=message):
        read(made(unit), unit, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight.0": torch.zeros(2, 5, 2)}, "expected 1 to 4 keys and values"),
        ({"weight.0": torch.zeros(2)}, "expected 1 to 4 keys and values"),
        ({"weight.0": None}, r"weight\.0 is missing"),
        ({"keys.0": torch.zeros(2, 2, 2, 6)}, r"keys\.0 is .*expected torch.float32 \(2, 3, 2, 6\)"),
        ({"values.2": torch.full((2, 3, 2, 6), torch.inf)}, r"values\.2 holds NaN or infinity"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(change, message):
    with pytest.raises(SavedCacheError, match=message):
        read(made(5, Absorb(tokens=4)), 5, change)


def test_layers_that_cannot_have_been_converted_are_refused():
    tensors, facts = absorption_to_tensors(made(3))
    with pytest.raises(SavedCacheError, match=r"no history of layers \[1\] after 3 of 5 chunks"):
        absorption_from_tensors(tensors, facts, begun(Absorb()), 3, (1,))
    tensors, facts = absorption_to_tensors(made(5))
    with pytest.raises(SavedCacheError, match=r"3 layers, of which ratio = 0\.5 converts 2 at most"):
        absorption_from_tensors(tensors, facts, begun(Absorb()), 5, (0, 1, 2))
