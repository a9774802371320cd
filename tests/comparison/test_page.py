import dataclasses
import html
import json
import re

import pytest
from PIL import Image

from fxq.comparison import tables
from fxq.comparison.page import render, write
from tests.comparison.example import PLAN, made_up


@pytest.fixture
def results(tmp_path, monkeypatch):
    return made_up(monkeypatch, tmp_path / "rows")


def test_the_page_has_every_row_with_the_numbers_of_the_table(results):
    page = render(results)
    body = re.search(r'<table class="variants sortable">.*?</table>', page, re.DOTALL)[0]
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", body.partition("<tbody>")[2], re.DOTALL)
    assert len(lines) == len(results.rows)
    for line, row in zip(lines, results.rows, strict=True):
        cells = re.findall(r'data-sort="([^"]*)">(.*?)(?:<small>(.*?)</small>)?</t[hd]>', line)
        assert [text for _, text, _ in cells[:2]] == [row.variant.method, row.variant.bits]
        for (sort, text, below), column in zip(cells[2:], tables.short_columns(results), strict=True):
            assert float(sort) == column.value(row)
            assert (text, below) == (column.shown(column.value(row)), column.below(row))
    for found in results.reliability:
        assert f"<td>{tables.metric_name(found.metric)}</td>" in page


def test_the_page_loads_nothing_and_its_links_lead_somewhere(results):
    page = render(results)
    assert "://" not in page and "default-src 'none'" in page
    assert not re.search(r"<(link|iframe|object|embed|base|img)\b", page)
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    assert {target for target in re.findall(r'href="#([^"]+)"', page)} <= ids
    assert "#fe0" not in page  # every placeholder has its colour


def test_hostile_text_stays_text(results):
    hostile = '<script>alert("x")</script>'
    rows = [dataclasses.replace(r, variant=dataclasses.replace(r.variant, method=hostile)) for r in results.rows[:1]]
    bad = dataclasses.replace(
        results, title=hostile, command=hostile, settings={hostile: hostile}, rows=(*rows, *results.rows[1:])
    )
    page = render(bad)
    assert "<script>alert" not in page and html.escape(hostile, quote=False).split("(")[0] in page
    assert len(re.findall(r"<script\b", page)) == len(re.findall(r"</script>", page)) == 1


def test_all_files_are_written(results, tmp_path):
    written = write(results, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in written)
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert told == json.loads(json.dumps(tables.to_json(results)))
    assert (tmp_path / "out" / "compare.csv").read_text() == tables.to_csv(results)
    assert (tmp_path / "out" / "compare.html").read_text() == render(results)
    for name in ("pareto.png", "drift.png"):
        assert f"({name})" in (tmp_path / "out" / "compare.md").read_text()
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.format == "PNG" and picture.width > 1000


def test_a_single_row_is_still_a_page(tmp_path, monkeypatch):
    plan = dataclasses.replace(PLAN, methods=("q_arvd",), bits=("w4a8",), seeds=(1,))
    page = render(made_up(monkeypatch, tmp_path, plan))
    assert "Paired comparisons" not in page and 'id="chunks"' in page
