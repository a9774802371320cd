"""``fxq cache``."""

import json

import pytest
from typer.testing import CliRunner

from fxq.cache.settings import policy_from_json
from fxq.cli import app
from fxq.cli.options.models import AdapterError

RUN = CliRunner()


def test_codecs_are_compared_and_one_is_chosen_for_each_layer():
    done = RUN.invoke(app, ["cache", "tiny", "--videos", "2", "--bits", "3", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert len(told["layers"]) == 8 and all(row["reason"] for row in told["layers"])
    assert sum(row["chosen"]["bits"] for row in told["layers"]) / 8 <= 3
    policy = policy_from_json(told["policy"])
    assert len(policy.keys) == len(policy.values) == 4
    assert all(1 <= held <= 32 for held in told["components_of_99_percent"]["keys"])


def test_the_tables_name_every_codec_and_layer():
    done = RUN.invoke(app, ["cache", "tiny", "--videos", "1", "--quiet"])
    assert done.exit_code == 0, done.output
    for word in ("qvg", "kivi2", "klt1", "quarot4", "keys", "values", "dB at"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--bits", "0.1"], "are too few: the cheapest codecs"), (["--span", "20"], "pass a smaller --span")],
)
def test_what_cannot_be_is_refused(words, message):
    done = RUN.invoke(app, ["cache", "tiny", "--videos", "1", "--quiet", *words])
    assert isinstance(done.exception, AdapterError) and message in str(done.exception)


def generate(tmp_path, *words):
    done = RUN.invoke(app, ["generate", "--out", str(tmp_path / "v.gif"), "--json", *words])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["scores"]


@pytest.mark.parametrize(
    "words",
    [
        ("--kv", "klt1"),
        ("--kv", "qvg", "--positions", "relative", "--window", "15", "--sink", "3", "--chunks", "9", "--span", "2"),
        ("--kv", "auto", "--kv-bits", "2.5"),
    ],
)
def test_videos_on_a_packed_cache_keep_shape_and_colour(words, tmp_path):
    scores = generate(tmp_path, *words)
    assert scores["shape"] == scores["colour"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--positions", "relative"), "needs a window"),
        (("--kv", "qvg", "--kv-bits", "2"), "the budget of --kv auto"),
        (("--kv", "qvg", "--window", "9", "--span", "4"), "a window of at least 18, or a smaller span"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(words, message, tmp_path):
    done = RUN.invoke(app, ["generate", "--out", str(tmp_path / "v.gif"), *words])
    assert isinstance(done.exception, AdapterError) and message in str(done.exception)


def test_a_report_says_what_the_cache_costs_chunk_by_chunk(tmp_path):
    page = tmp_path / "cache.html"
    words = ("--kv", "klt1", "--span", "1", "--chunks", "4", "--report", str(page))
    done = RUN.invoke(app, ["generate", "--out", str(tmp_path / "v.gif"), "--json", *words])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["report"] == str(page) and page.read_text().startswith("<!doctype html>")
    cache = told["cache"]
    assert len(cache["commit"]) == 4 and cache["packed"][1] > 0 and cache["plain"][-1] > cache["packed"][-1]
    assert cache["mse"][0][:2] == [0, 0] and cache["mse"][0][3] > 0 and cache["scores"]["shape"] == [1] * 4


def test_a_codec_that_is_not_known_is_refused_with_those_that_are(tmp_path):
    done = RUN.invoke(app, ["generate", "--out", str(tmp_path / "v.gif"), "--kv", "kvi2"])
    assert isinstance(done.exception, AdapterError) and "did you mean 'kivi2'" in str(done.exception)


RECIPE = """
extends = "w8a8-dynamic"
name = "w8a8-klt"

[cache]
window = 21
sink = 3
positions = "relative"
span = 2
keys = "klt"
values = "klt"
"""


@pytest.mark.sweep
def test_a_bundle_brings_the_cache_of_its_recipe(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE)
    words = ["quantize", "--out", str(tmp_path / "b"), "--recipe", str(tmp_path / "r.toml"), "--videos", "1", "--quiet"]
    assert RUN.invoke(app, words).exit_code == 0
    bundle = ("--bundle", str(tmp_path / "b"))
    scores = generate(tmp_path, *bundle, "--chunks", "9")
    assert scores["shape"] == scores["colour"] == 1
    done = RUN.invoke(app, ["generate", "--out", str(tmp_path / "v.gif"), *bundle, "--kv", "qvg"])
    assert isinstance(done.exception, AdapterError) and "cache of its own, by its recipe" in str(done.exception)
