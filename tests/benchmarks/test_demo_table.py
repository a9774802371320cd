import json
import pathlib

import pytest

from benchmarks.demo_table import TABLES, filled

ROOT = pathlib.Path(__file__).parents[2]
REPORT = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", TABLES)
def test_the_tables_of_a_page_are_the_stored_reports(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert filled(page, text, REPORT) == text


def test_a_number_that_was_not_measured_is_replaced():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled("README.md", text.replace("| 0.543 |", "| 0.143 |"), REPORT) == text


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match=r"README\.md has no <!-- demo:begin -->"):
        filled("README.md", "# fxq", REPORT)
