"""A short run of the fuzzer; ``python -m tests.attacks.fuzz --minutes 60 --seed N`` is the long one."""

import random
import shutil

import pytest

from tests.attacks import corpus, fuzz
from tests.attacks.mutants import MUTATORS, mutate, splice


@pytest.mark.slow
def test_a_minute_of_mutants_finds_nothing():
    result = fuzz.campaign(minutes=1, seed=2026, patience=60)
    assert result["mutants"] > 60
    assert result["findings"] == []
    assert set(result["ends"]) >= {"refused", "loaded"}


def test_a_mutant_is_the_same_for_the_same_number(bases, tmp_path):
    others = [base.folder for base in bases.values()]
    for number in range(5):
        made = []
        for copy in ("a", "b"):
            shutil.copytree(bases["w8"].folder, tmp_path / copy)
            mutate(tmp_path / copy, random.Random(number), others)
            made.append([(tmp_path / copy / name).read_bytes() for name in corpus.FILES])
            shutil.rmtree(tmp_path / copy)
        assert made[0] == made[1]


@pytest.mark.parametrize("way", [way for way, _ in MUTATORS if way is not splice], ids=lambda way: way.__name__)
def test_every_way_changes_a_bundle(bundle, bases, way):
    way(bundle, random.Random(1))
    assert any((bundle / name).read_bytes() != (bases["w4"].folder / name).read_bytes() for name in corpus.FILES)
