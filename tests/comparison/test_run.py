"""A comparison is the same however often it was stopped."""

import dataclasses
import json

import numpy as np
import pytest

from fxq.comparison.methods import ComparisonError
from fxq.comparison.run import Plan
from fxq.comparison.tables import to_json
from tests.comparison.example import PLAN, MadeUp, made_up


def files(folder):
    return {path.name: path.read_text() for path in folder.rglob("*.json")}


def test_a_killed_run_goes_on_with_what_is_missing_and_ends_in_the_same_table(tmp_path, monkeypatch):
    whole = made_up(monkeypatch, tmp_path / "whole")
    everything = list(MadeUp.measured)
    assert len(everything) == 12
    with pytest.raises(KeyboardInterrupt):
        made_up(monkeypatch, tmp_path / "killed", fails_after=7)
    assert len(list((tmp_path / "killed" / "rows").glob("seed-*.json"))) == 7
    resumed = made_up(monkeypatch, tmp_path / "killed")
    assert MadeUp.measured == everything[7:]
    assert to_json(resumed) == to_json(whole)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["seed-2-w4a8-nearest.json", "full-precision-1.json"])
def test_a_file_that_was_removed_is_made_again(name, tmp_path, monkeypatch):
    before = to_json(made_up(monkeypatch, tmp_path))
    (tmp_path / "rows" / name).unlink()
    assert to_json(made_up(monkeypatch, tmp_path)) == before
    assert MadeUp.measured == ([(2, "w4a8", "nearest")] if name.startswith("seed") else [])


def test_a_folder_is_given_more_methods_widths_and_seeds(tmp_path, monkeypatch):
    made_up(monkeypatch, tmp_path, dataclasses.replace(PLAN, methods=("minmax",), bits=("w4a8",), seeds=(2,)))
    results = made_up(monkeypatch, tmp_path)
    assert (2, "w4a8", "minmax") not in MadeUp.measured and len(MadeUp.measured) == 11
    assert to_json(results)["rows"] == to_json(made_up(monkeypatch, tmp_path / "at once"))["rows"]


def test_a_folder_of_another_setting_is_refused_with_what_differs(tmp_path, monkeypatch):
    made_up(monkeypatch, tmp_path)
    kept = files(tmp_path)
    for changed, message in (
        ({"extent": dataclasses.replace(PLAN.extent, videos=6)}, "videos is 5 there, 6 here"),
        ({"extent": dataclasses.replace(PLAN.extent, chunks=9)}, "chunks is None there, 9 here"),
        ({"iterations": 5}, "iterations is None there, 5 here"),
    ):
        with pytest.raises(ComparisonError, match=f"results of another setting: {message}; choose another --out"):
            made_up(monkeypatch, tmp_path, dataclasses.replace(PLAN, **changed))
    with pytest.raises(ComparisonError, match="model is made up there, other here"):
        made_up(monkeypatch, tmp_path, identity={"model": "other"})
    monkeypatch.setattr("fxq.comparison.run.environment", lambda: {"torch": "0.1"})
    with pytest.raises(ComparisonError, match=r"torch is \S+ there, 0.1 here.* and \d+ more"):
        made_up(monkeypatch, tmp_path)
    assert files(tmp_path) == kept and MadeUp.measured == []


def test_rows_of_seeds_are_pooled_and_paired_with_the_base(tmp_path, monkeypatch):
    results = made_up(monkeypatch, tmp_path)
    assert [(r.variant.bits, r.variant.method) for r in results.rows][:4] == [
        ("W8A8", "minmax"),
        ("W8A8", "nearest"),
        ("W8A8", "q_arvd"),
        ("W4A8", "minmax"),
    ]
    assert results.base == "minmax" and all(len(v.psnr) == 10 for v in results.variants)
    for row in results.rows:
        assert list(row.seeds) == [1, 2]
        mean = np.mean([means["latent_mse"] for means in row.seeds.values()])
        assert row.variant.latent_mse.mean() == pytest.approx(mean)
        ratio = row.paired["latent_mse"]
        if row.variant.method == "minmax":
            assert (ratio.ratio, ratio.low, ratio.high) == (1, 1, 1)
        if row.variant.method == "q_arvd":
            assert ratio.high < 1 and ratio.b == "minmax" and ratio.videos == 10
    other = made_up(monkeypatch, tmp_path, dataclasses.replace(PLAN, base="q_arvd"))
    assert MadeUp.measured == []
    for a, b in zip(results.rows, other.rows, strict=True):
        if a.variant.method == "q_arvd":
            inverse = next(r for r in other.rows if (r.variant.method, r.variant.bits) == ("minmax", b.variant.bits))
            assert inverse.paired["latent_mse"].ratio == pytest.approx(1 / a.paired["latent_mse"].ratio)


def test_a_plan_that_cannot_be_is_refused():
    with pytest.raises(ComparisonError, match=r"base 'q_arv' is not compared; did you mean 'q_arvd'\? of: minmax, "):
        made = dataclasses.replace(PLAN, base="q_arv")
        made.base_among(made.entries())
    for seeds in ((), (1, 1), (-1,)):
        with pytest.raises(ComparisonError, match="expected numbers from 0 on, each once"):
            Plan(methods=("minmax",), bits=("w4a8",), seeds=seeds).entries()


def test_files_hold_no_number_that_json_has_not(tmp_path, monkeypatch):
    made_up(monkeypatch, tmp_path)

    def refuse(name):
        raise AssertionError(name)

    for text in files(tmp_path).values():
        json.loads(text, parse_constant=refuse)
