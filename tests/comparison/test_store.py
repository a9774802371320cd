import dataclasses
import json

import numpy as np
import pytest

from fxq.comparison.measure import Reference, Seconds
from fxq.comparison.methods import ComparisonError, entries
from fxq.comparison.store import Store
from tests.report.example import variant

SECONDS = Seconds(statistics=1.5, sensitivity=0.0, methods=0.25)


def filled(folder):
    store = Store(folder, {"videos": 3})
    store.open()
    (entry,) = entries(["q_arvd:weighting=uniform"], ["w4a8"])
    made = variant(entry.method, "W4A8", 0.2, 3, np.random.default_rng(0))
    store.write_row(entry, 4, made, SECONDS)
    return store, entry, made


def test_a_row_comes_back_as_it_was_but_for_what_is_not_finite(tmp_path):
    store, entry, made = filled(tmp_path)
    broken = dataclasses.replace(made, psnr=np.array([30.0, np.nan, np.inf]))
    store.write_row(entry, 5, broken, SECONDS)
    for seed, wanted in ((4, made), (5, dataclasses.replace(broken, psnr=np.array([30.0, np.nan, np.nan])))):
        found, seconds = store.row(entry, seed)
        assert seconds == SECONDS
        for field in dataclasses.fields(found):
            a, b = (getattr(v, field.name) for v in (found, wanted))
            assert np.array_equal(a, b, equal_nan=True) if isinstance(b, np.ndarray) else a == b, field.name
    assert store.row(entry, 6) is None


def test_a_row_of_another_recipe_is_refused_with_what_differs(tmp_path):
    store, entry, _ = filled(tmp_path)
    other = dataclasses.replace(entry, recipe=dataclasses.replace(entry.recipe, rows_per_call=7))
    with pytest.raises(ComparisonError, match="made with another recipe: rows per call is 512 there, 7 here"):
        store.row(other, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "is no row of a comparison"), ('{"recipe": {}}', "is no row of a comparison")],
)
def test_a_damaged_row_is_named_with_the_remedy(text, message, tmp_path):
    store, entry, _ = filled(tmp_path)
    (file,) = (tmp_path / "rows").glob("*.json")
    file.write_text(text)
    with pytest.raises(ComparisonError, match=f"{file.name}.*{message}.*delete it"):
        store.row(entry, 4)


def test_a_damaged_reference_is_named_with_the_remedy(tmp_path):
    store, _, _ = filled(tmp_path)
    made = Reference(scores={"shape": 1.0}, limits=(-1.0, 1.0), chunks=7, trained=7)
    store.write_reference(1, made)
    assert store.has_reference(1) and not store.has_reference(2) and store.reference(1) == made
    (tmp_path / "rows" / "full-precision-1.json").write_text("{}")
    with pytest.raises(ComparisonError, match=r"full-precision-1\.json is no reference .* delete it"):
        store.reference(1)


def test_names_that_file_systems_do_not_take_have_files_of_their_own(tmp_path):
    store, _, made = filled(tmp_path)
    rows = entries(["q_arvd:weighting=reversed", "q_arvd:weighting=uniform,max_rows=9"], ["w4a8"])
    for entry in rows:
        store.write_row(entry, 4, made, SECONDS)
    names = [path.name for path in (tmp_path / "rows").iterdir()]
    assert len(names) == 3 and not any(set(name) & set(":=,/ ") for name in names)


def test_rows_without_settings_are_not_taken(tmp_path):
    filled(tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ComparisonError, match=r"has rows and no settings\.json"):
        Store(tmp_path, {"videos": 3}).open()


def test_what_is_not_there_on_one_side_is_said(tmp_path):
    filled(tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text()) == {"videos": 3}
    with pytest.raises(ComparisonError, match="device is absent there, cpu here"):
        Store(tmp_path, {"videos": 3, "device": "cpu"}).open()
