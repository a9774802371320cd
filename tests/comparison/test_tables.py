import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from fxq.comparison import tables
from fxq.comparison.results import Results
from tests.comparison.example import PLAN, made_up


@pytest.fixture
def results(tmp_path, monkeypatch) -> Results:
    return made_up(monkeypatch, tmp_path)


def text_of(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def lines_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def markdown_rows(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    names = rows[0]
    return [dict(zip(names, row, strict=True)) for row in rows[2:] if len(row) == len(names)]


def test_every_form_has_every_row_and_they_agree(results):
    lines, told = lines_of(tables.to_csv(results)), tables.to_json(results)["rows"]
    shown = markdown_rows(tables.to_markdown(results))[1:]
    terminal = text_of(tables.terminal_table(results))
    columns = {f"{c.heading} {c.unit}".strip(): c for c in tables.columns(results)}
    assert len(lines) == len(told) == len(shown) == len(results.rows) == 6
    for line, row, cells, own in zip(lines, told, shown, results.rows, strict=True):
        v = own.variant
        assert {(x["method"], x["bits"]) for x in (line, row, cells)} == {(v.method, v.bits)}
        for name, column in columns.items():
            value = column.value(own)
            assert float(line[column.key]) == row[column.key] == value
            assert cells[name] == column.cell(own)
        printed = next(found for found in terminal.splitlines() if found.split()[:2] == [v.method, v.bits])
        for column in tables.short_columns(results):
            assert column.cell(own) in printed


def test_numbers_are_those_of_the_videos(results):
    row, own = tables.to_json(results)["rows"][5], results.rows[5]
    v = own.variant
    assert (row["method"], row["bits"], row["videos"], row["base"]) == ("q_arvd", "W4A8", 10, "minmax")
    assert row["teacher_forced"] == v.teacher_forced.mean() == np.mean(row["by_video"]["teacher_forced"])
    assert row["teacher_forced_low"] < row["teacher_forced"] < row["teacher_forced_high"]
    assert row["teacher_forced_median_chunk"] == np.median(row["by_chunk"]["teacher_forced"])
    assert row["teacher_forced_worst_chunk"] == row["by_chunk"]["teacher_forced"][row["worst_chunk"] - 1]
    assert row["size_ratio"] == (v.bytes + v.kept_bytes) / (v.bytes / v.size_ratio + v.kept_bytes)
    assert row["seconds"] == row["seconds_statistics"] + row["seconds_sensitivity"] + row["seconds_methods"]
    assert list(row["by_seed"]) == ["1", "2"]


def test_errors_of_chunks_have_a_line_each(results):
    lines = lines_of(tables.chunks_to_csv(results))
    assert len(lines) == 6 * 7
    last = results.rows[5].variant
    assert lines[-1]["chunk"] == "7"
    assert float(lines[-1]["latent_mse"]) == pytest.approx(last.chunk_mse[:, -1].mean())


def test_the_json_says_how_and_where(results):
    told = json.loads(json.dumps(tables.to_json(results), allow_nan=False))
    assert told["command"] == "fxq compare ..." and told["environment"]["torch"] and told["date"]
    assert told["settings"] | {"videos": 5, "seeds": [1, 2], "bits": ["w8a8", "w4a8"]} == told["settings"]
    for found in told["reliability"]:
        if found["boa"] is not None:
            assert found["ds"] == pytest.approx(found["cv"] * found["boa"])
    page = tables.to_markdown(results, ["pareto.png"])
    for text in (told["command"], told["environment"]["torch"], told["date"], "![pareto.png](pareto.png)"):
        assert text in page


def test_the_best_of_a_width_is_marked_by_what_is_shown(results):
    forced = next(c for c in tables.columns(results) if c.key == "teacher_forced")
    assert tables.best(results, forced) == {2, 5}  # q_arvd, at both widths
    shape = next(c for c in tables.columns(results) if c.key == "shape")
    assert tables.best(results, shape) == set()  # all alike
    size = next(c for c in tables.columns(results) if c.key == "size_ratio")
    assert tables.best(results, size) == set()


def test_what_is_not_known_is_a_dash_or_empty(tmp_path, monkeypatch):
    plan = dataclasses.replace(PLAN, methods=("minmax", "w8a8-dynamic"), bits=("w4a8", "w4a6"), seeds=(1,))
    results = made_up(monkeypatch, tmp_path, plan)
    line = lines_of(tables.to_csv(results))[-1]
    assert line["method"] == "w8a8-dynamic" and line["latent_mse_to_base"] == line["latent_mse_to_base_low"] == ""
    row = tables.to_json(results)["rows"][-1]
    assert row["latent_mse_to_base"] is None
    assert markdown_rows(tables.to_markdown(results))[-1]["latent MSE / base"] == "-"
    assert math.isnan(results.reliability[0].between_seeds)
    assert tables.reliability_rows(results)[0][-1] == "-"


def test_the_best_of_each_width_is_said_in_words(results):
    said = tables.sentences(results)
    assert list(said) == ["W8A8", "W4A8"]
    assert "q_arvd has 0." in said["W4A8"] and "of minmax (95 % interval" in said["W4A8"]


def test_markup_in_names_stays_text(results):
    hostile = "a|b<script>[bold]x"
    row = dataclasses.replace(results.rows[0], variant=dataclasses.replace(results.rows[0].variant, method=hostile))
    results = dataclasses.replace(results, rows=(row, *results.rows[1:]))
    assert hostile in text_of(tables.terminal_table(results))
    page = tables.to_markdown(results)
    assert "<script>" not in page and "a\\|b&lt;script>" in page
    assert lines_of(tables.to_csv(results))[0]["method"] == hostile
