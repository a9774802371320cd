"""``fxq cache``."""

import json

import pytest
from typer.testing import CliRunner

from fxq.cache.settings import policy_from_json
from fxq.cli import app
from fxq.cli.models import AdapterError

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
    for word in ("QVG", "KIVI 2b", "KLT 1b", "QuaRot 4b", "keys", "values", "dB at"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--bits", "0.1"], "are too few: the cheapest codecs"), (["--span", "20"], "pass a smaller --span")],
)
def test_what_cannot_be_is_refused(words, message):
    done = RUN.invoke(app, ["cache", "tiny", "--videos", "1", "--quiet", *words])
    assert isinstance(done.exception, AdapterError) and message in str(done.exception)
