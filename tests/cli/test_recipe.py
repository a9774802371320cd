import json

import pytest
from typer.testing import CliRunner

import fxq
from fxq.cli import app
from fxq.recipes import recipe_from_json


def invoke(*arguments):
    return CliRunner().invoke(app, ["recipe", *map(str, arguments)])


@pytest.mark.parametrize("name", sorted(fxq.PRESETS))
def test_show_prints_a_file_that_loads_as_the_same_recipe(name, tmp_path):
    done = invoke("show", name)
    assert done.exit_code == 0
    (tmp_path / "shown.toml").write_text(done.stdout)
    assert fxq.load_recipe(tmp_path / "shown.toml") == fxq.PRESETS[name]
    assert recipe_from_json(json.loads(invoke("show", name, "--json").stdout)) == fxq.PRESETS[name]


def test_show_writes_out_what_a_file_extends(tmp_path):
    (tmp_path / "mine.toml").write_text('extends = "w8a8"\nname = "mine"\n')
    done = invoke("show", tmp_path / "mine.toml")
    assert "extends" not in done.stdout and done.stdout.startswith('name = "mine"\n')
    (tmp_path / "again.toml").write_text(done.stdout)
    assert fxq.load_recipe(tmp_path / "again.toml") == fxq.load_recipe(tmp_path / "mine.toml")


def test_an_unknown_recipe_is_refused():
    assert isinstance(invoke("show", "w9a9").exception, fxq.RecipeError)


def test_list_names_the_presets_and_says_which_need_data():
    rows = {row["name"]: row for row in json.loads(invoke("list", "--json").stdout)}
    assert list(rows) == list(fxq.PRESETS)
    without = {"w8a8-dynamic", "w4a8-dynamic", "w8a8-token", "w4a8-token", "w4a6-token"}
    without |= {"w8a8-single", "w8a8-single-convrot", "fp8-dynamic"}
    assert {name for name, row in rows.items() if not row["needs_data"]} == without
    assert rows["w4a6"]["bits"] == ["W4A6"] and rows["w4a6"]["methods"][:3] == ["RangeSearch", "InputSearch", "GPTQ"]
    assert rows["q_arvd-w4a6"]["methods"] == ["RangeSearch", "AdaRound"]
    assert all(name in invoke("list").stdout for name in fxq.PRESETS)
