"""``fxq compare --bundles``."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fxq.cli import app
from fxq.cli.compare_bundles import Showing, _stage
from fxq.cli.options.models import AdapterError, ModelFiles
from fxq.cli.options.videos import VideoFiles
from fxq.comparison.methods import ComparisonError
from tests import wan
from tests.cli.test_generate import frames_of

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return wan.folders(tmp_path_factory)


def compare(*words, code=0):
    done = CliRunner().invoke(app, ["compare", *map(str, words), "--quiet"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def brightness(pairs):
    """A metric of a user."""
    return float(np.mean([pair.frames.mean() for pair in pairs]))


@pytest.mark.sweep
def test_a_wan_pipeline_is_compared_on_video_from_prompts_in_words(made, tmp_path):
    pipe, bundle = made
    shutil.copytree(bundle, tmp_path / "again")
    (tmp_path / "p.txt").write_text("a red cat\nthe dog runs\n")
    words = [*wan.LOOP, "--pipeline", pipe, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "report"]
    words += ["--metric", f"brightness={__name__}:brightness"]
    shown = compare(*words, "--bundles", bundle, tmp_path / "again")
    assert "full precision" in shown and "forced PSNR" in shown and "Not measured: LPIPS" in shown
    told = json.loads((tmp_path / "report" / "compare.json").read_text())
    assert told["prompts"] == ["a red cat", "the dog runs"] and told["space"] == "pixels"
    w8, again = told["rows"]
    assert (w8["name"], again["name"]) == ("w8", "again")
    assert w8["by_chunk"]["forced_psnr"] == again["by_chunk"]["forced_psnr"], "the same bundle by another name"
    assert 40 < w8["forced_psnr_worst"] <= w8["forced_psnr_median"] < 100
    assert w8["by_chunk"]["forced_psnr"][0][0] == w8["by_chunk"]["free_psnr"][0][0], "the first chunk has no history"
    assert told["full"]["metrics"]["brightness"] == pytest.approx(w8["metrics"]["brightness"], abs=1)
    frames, rate = frames_of(tmp_path / "report" / told["clips"][1])
    assert rate == 16 and frames.shape[0] == 21
    alone, _ = frames_of(tmp_path / "report" / "videos" / "full_precision" / "002.mp4")
    scale = alone.shape[1] // 32
    panel = frames[:, 20 : 20 + alone.shape[1], : alone.shape[2]]
    assert scale == 5 and np.abs(panel.astype(float) - alone).mean() < 6
    page = (tmp_path / "report" / "compare.html").read_text()
    assert all(f'src="{clip}"' in page for clip in told["clips"])


@pytest.mark.sweep
def test_the_shipped_model_is_compared_on_its_own_words_and_length(tmp_path):
    done = CliRunner().invoke(app, ["quantize", "--recipe", "w8a8-dynamic", "--quiet", "--out", str(tmp_path / "w8")])
    assert done.exit_code == 0, done.output
    (tmp_path / "p.txt").write_text("ring red right slow black row1 column2\n")
    words = ["--bundles", tmp_path / "w8", "--prompts", tmp_path / "p.txt", "--seeds", "4", "--chunks", "2"]
    told = json.loads(compare(*words, "--out", tmp_path / "report", "--json"))
    assert told["prompts"] == ["ring red right slow black row1 column2"]
    assert np.array(told["rows"][0]["by_chunk"]["free_psnr"]).shape == (1, 2)
    assert told["rows"][0]["forced_psnr_worst"] > 30
    frames, rate = frames_of(tmp_path / "report" / told["clips"][0])
    assert rate == 8 and frames.shape == (6, 20 + 160, 3 * 160 + 2 * 4, 3)


@pytest.mark.sweep
def test_without_a_decoder_latents_are_compared(made, tmp_path):
    pipe, bundle = made
    save_file({"prompts": torch.randn(2, 5, wan.TEXT_DIM)}, tmp_path / "p.safetensors")
    words = [*wan.LOOP, "--checkpoint", pipe / "transformer", "--prompts", tmp_path / "p.safetensors"]
    shown = compare(*words, "--bundles", bundle, "--videos", "1", "--seeds", "1,2", "--out", tmp_path / "r")
    told = json.loads((tmp_path / "r" / "compare.json").read_text())
    assert told["space"] == "latents" and not told["clips"] and "w8:" in shown
    assert told["prompts"] == ["prompts.0", "prompts.0"]
    one, two = told["rows"][0]["by_chunk"]["free_psnr"]
    assert one != two, "each seed has noise of its own"


def test_more_prompts_and_seeds_make_no_finished_video_another(tmp_path):
    def staged(lines, seeds):
        (tmp_path / "p.txt").write_text("ring red right slow black row1 column2\n" * lines)
        files = ModelFiles(prompts=str(tmp_path / "p.txt"), device="cpu")
        return _stage(
            Showing(
                bundles=(),
                model="tiny",
                files=files,
                video=VideoFiles(),
                seeds=seeds,
                videos=None,
                chunks=None,
                metrics=(),
            )
        )

    few, many = staged(1, [1]), staged(2, [1, 2])
    assert few.identity == many.identity and few.settings != many.settings
    assert [draws.seeds for _, draws in many.rollout.batches] == [(1000,), (1001,), (2000,), (2001,)]
    assert few.rollout.batches[0][1].seeds == (1000,) and len(many.prompts) == 4


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--bundles", "x", "--bits", "w8a8"], AdapterError, "--bits: bundles are quantized already"),
        (["--bundles", "x", "--quick", "--base", "minmax"], AdapterError, "--base, --quick: bundles are"),
        (["minmax", "--vae", "v"], AdapterError, "--vae: methods are compared on latents"),
        (["minmax", "--videos", "1"], ComparisonError, "an interval needs two videos"),
        (["--bundles", "x"], ComparisonError, "x is no bundle"),
        (["--bundles", "x", "--metric", "lpips"], ComparisonError, "metric 'lpips': no plug-in has this name"),
        (["--bundles", "x", "--lora", "l"], AdapterError, "model 'tiny' takes --prompts with words and --device"),
        (["--bundles", "x", "--prompts", "p.npz"], AdapterError, r"takes a \.txt with a prompt a line"),
        (["--bundles", "x", "--model", "longlive"], AdapterError, "needs checkpoint"),
    ],
)
def test_what_cannot_be_is_refused(words, error, message, tmp_path):
    with pytest.raises(error, match=message):
        compare(*words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_methods_or_bundles_must_be_named(tmp_path):
    assert "name methods to quantize by, or finished bundles" in compare("--out", tmp_path, code=2)
