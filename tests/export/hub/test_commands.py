import json

import pytest
from typer.testing import CliRunner

import fxq
from fxq.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_push_and_verify_by_name(hub, bundle):
    hub.repositories["org/base"] = {}
    hub.cards["org/base"] = {"license": "apache-2.0"}
    done = run("push", bundle, "me/toy", "--base-model", "org/base", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["repository"] == "me/toy"
    assert b"license: apache-2.0" in hub.repositories["me/toy"]["README.md"]
    verdict = run("verify", "me/toy@main", "--json")
    assert verdict.exit_code == 0 and json.loads(verdict.stdout)["ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "me/none"), "no such repository"),
        (("card", "nothere"), "neither a bundle of fxq"),
        (("inspect", "me/none"), "no such repository"),
        (("export", "me/none", "--target", "comfy", "--out", "e"), "no such repository"),
    ],
)
def test_what_is_not_there_is_refused(hub, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 1 and isinstance(done.exception, fxq.BundleError) and message in str(done.exception)


def test_a_card_is_written_to_a_file(hub, bundle, tmp_path):
    done = run("card", bundle, "--out", tmp_path / "card.md", "--license", "mit")
    assert done.exit_code == 0 and (tmp_path / "card.md").read_text().startswith("---\n")
    assert run("card", bundle, "--license", "mit").stdout == (tmp_path / "card.md").read_text()
