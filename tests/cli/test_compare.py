"""``fxq compare``."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from fxq.cli import app
from fxq.cli.options.models import AdapterError
from fxq.comparison.methods import ComparisonError
from fxq.presets import PRESETS
from fxq.recipes import recipe_to_toml
from tests.published import options

RUN = CliRunner()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Options of a small checkpoint in the published form."""
    words = options(tmp_path_factory.mktemp("published"), prompts=6)
    return [*words, "--videos", "2", "--calibration-videos", "2", "--quiet"]


def compare(*words):
    done = RUN.invoke(app, ["compare", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.sweep
def test_a_published_model_is_compared_in_every_form(published, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(recipe_to_toml(PRESETS["w8a8-dynamic"]))
    words = ["minmax", "nearest", str(recipe), *published, "--bits", "w8a8,w4a8", "--seeds", "3"]
    words += ["--out", tmp_path / "out"]
    shown = compare(*words)
    names = [("minmax", "W8A8"), ("nearest", "W8A8"), ("mine", "W8A8"), ("minmax", "W4A8"), ("nearest", "W4A8")]
    lines = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert [(line["method"], line["bits"]) for line in lines] == names
    page = (tmp_path / "out" / "compare.html").read_text()
    for method, bits in names:
        assert any(line.split()[:2] == [method, bits] for line in shown.splitlines())
        assert f'>{method}</th><td data-sort="{bits}">' in page
    for absent in ("shape", "motion", "full precision"):
        assert absent not in lines[0] and f">{absent}<" not in page
    told = json.loads(compare(*words, "--json"))
    assert [(row["method"], row["bits"]) for row in told["rows"]] == names
    assert told["settings"]["checkpoint"].endswith("bytes") and told["settings"]["seeds"] == [3]
    for metric in ("teacher_forced", "latent_mse"):
        assert all(row[f"{metric}_to_base"] == 1 for row in told["rows"] if row["method"] == "minmax")
    with pytest.raises(ComparisonError, match="results of another setting: frames is 6 there, 9 here"):
        compare(*words, "--frames", "9")


def test_prompts_to_measure_on_come_behind_those_to_calibrate_on(published, tmp_path):
    from fxq.cli.compare import _subject
    from fxq.cli.options.models import ModelFiles
    from fxq.comparison.measure import Extent

    options = dict(zip(published[0::2], published[1::2], strict=False))
    files = ModelFiles(
        checkpoint=tmp_path.__class__(options["--checkpoint"]), prompts=options["--prompts"],
        frames=6, height=4, width=6, device="cpu",
    )  # fmt: skip
    subject = _subject("causal-wan", files, Extent(videos=3, calibration_videos=2))
    calibration, measured = subject.rollouts(2, 1, False)[0], subject.rollouts(3, 101, True)[0]
    assert calibration.denoiser is measured.denoiser
    seen = [condition["prompt_embeds"] for condition, _ in calibration.batches]
    unseen = [condition["prompt_embeds"] for condition, _ in measured.batches]
    assert len(seen) == 2 and len(unseen) == 3
    assert not any(torch.equal(a, b) for a in seen for b in unseen)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["minmx"], ComparisonError, "did you mean 'minmax'"),
        (["minmax", "--bits", "w4a88"], ComparisonError, "did you mean 'w4a8'"),
        (["minmax", "--base", "nearest"], ComparisonError, "base 'nearest' is not compared"),
        (["minmax", "--seeds", "one"], ComparisonError, "seeds 'one': expected numbers such as 1,2,3"),
        (["minmax", "--model", "diffusers"], AdapterError, "makes no videos to compare"),
        (["minmax", "--frames", "9"], AdapterError, "model 'tiny' takes no files"),
        (["minmax", "--model", "self-forcing"], AdapterError, "needs checkpoint"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(words, error, message, tmp_path):
    with pytest.raises(error, match=message):
        compare(*words, "--quiet", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.sweep
def test_a_run_that_was_killed_goes_on_and_ends_in_the_same_table(published, tmp_path):
    words = ["minmax", "nearest", "--bits", "w8a8", "--seeds", "1,2", *published, "--json", "--out"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "fxq", "compare", *words, str(tmp_path / "killed")], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("killed/rows/seed-*.json"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 1 <= len(list(tmp_path.glob("killed/rows/seed-*.json"))) < 4
    resumed, whole = (json.loads(compare(*words, tmp_path / name)) for name in ("killed", "whole"))

    def measures(told):
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in told["rows"]]

    assert measures(resumed) == measures(whole)
    assert resumed["full_precision"] == whole["full_precision"]
