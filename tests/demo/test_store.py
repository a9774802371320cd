import dataclasses

import pytest
import torch

import fxq
from fxq.demo.store import Finished
from tests.toys import recipe, rows, toy


@pytest.fixture(scope="module")
def module():
    return fxq.quantize(toy(), [rows(32, 96)], recipe(8), progress=False)


class Maker:
    """Counts how often it makes the module."""

    def __init__(self, module):
        self.module, self.times = module, 0

    def __call__(self):
        self.times += 1
        return self.module, 2.5


def test_what_is_finished_is_not_made_again(module, tmp_path):
    make, x = Maker(module), rows(5, 96)
    for _ in range(3):
        again, seconds = Finished(tmp_path / "f", {"seed": 1}).made(recipe(8), make)
        assert seconds == 2.5 and torch.equal(again(x), module(x))
    assert make.times == 1


def test_other_settings_or_recipes_are_made_anew(module, tmp_path):
    make = Maker(module)
    for settings, chosen in (({"seed": 1}, recipe(8)), ({"seed": 2}, recipe(8)), ({"seed": 1}, recipe(4))):
        Finished(tmp_path, settings).made(chosen, make)
    assert make.times == 3


def test_a_damaged_one_is_made_again(module, tmp_path):
    make, kept = Maker(module), Finished(tmp_path, {})
    kept.made(recipe(8), make)
    for file in tmp_path.rglob("graph.json"):
        file.write_text("{")
    kept.made(recipe(8), make)
    (note,) = tmp_path.glob("*.json")
    note.write_text("[]")
    assert kept.made(recipe(8), make)[1] == 2.5
    assert make.times == 3


def test_nothing_is_kept_without_a_folder_or_after_the_end(module, tmp_path):
    make = Maker(module)
    for _ in range(2):
        assert Finished(None, {}).made(dataclasses.replace(recipe(8), name="a b"), make)[0] is module
    kept = Finished(tmp_path / "f", {})
    kept.made(recipe(8), make)
    kept.clear()
    kept.clear()
    assert not (tmp_path / "f").exists() and make.times == 3
