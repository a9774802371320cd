import dataclasses
import json

import pytest
from typer.testing import CliRunner

import fxq
from fxq.cache.absorb import Absorb
from fxq.cache.codecs import Int8Attention, Klt
from fxq.cache.policy import CachePolicy
from fxq.cli import app
from fxq.cli.options.cache_options import CacheOptions, exact_caches, tables_for
from fxq.cli.options.models import AdapterError
from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny
from fxq.passes.with_cache import policy_of
from tests.metrics.test_latents import doubling

RUN = CliRunner()
RELATIVE = {"positions": "relative", "window": 21, "sink": 3}


@pytest.fixture(scope="module")
def rollout():
    return tiny_rollout(load_tiny(), 2, seed=1, unseen=False)[0]


def test_what_is_not_asked_for_stays_the_models_own(rollout):
    own = CachePolicy(window=9, sink=3, span=1)
    other = tiny_rollout(load_tiny(), 1, seed=1, unseen=False)[0]
    other.sampler = dataclasses.replace(other.sampler, cache=own)
    assert CacheOptions().policy(other, None) == own
    assert CacheOptions(window=12).policy(other, None) == dataclasses.replace(own, window=12)
    assert CacheOptions(kv="klt1").policy(rollout, None).span == 2
    assert CacheOptions().given == "" and CacheOptions(kv="klt1", kv_bits=2.0).given == "--kv, --kv-bits"


def test_codecs_and_absorbed_layers_are_those_that_were_asked_for(rollout):
    policy = CacheOptions(kv="klt1", absorb=0.25, **RELATIVE).policy(rollout, None)
    assert policy == CachePolicy(**RELATIVE, span=2, keys=Klt(1.0), values=Klt(1.0), absorb=Absorb(ratio=0.25))


def test_calibrated_codecs_have_names_and_learn_from_calibration_videos(rollout):
    policy = CacheOptions(kv="klt1-model").policy(rollout, None)
    assert policy.keys == policy.values == Klt(1.0, fit="model")
    keys, values = tables_for(policy, rollout)
    assert len(keys) == len(values) == 4 and tuple(keys[0]["basis"].shape) == (3, 32, 32)
    assert CacheOptions(kv="klt1-joint").policy(rollout, None).keys == Klt(1.0, joint=True, fit="model")
    assert tables_for(CacheOptions(kv="klt1").policy(rollout, None), rollout) is None


def test_integers_for_attention_have_a_name_and_absolute_positions(rollout):
    policy = CacheOptions(kv="int8-attention").policy(rollout, None)
    assert policy.keys == policy.values == Int8Attention() and policy.integers
    with pytest.raises(AdapterError, match="the cache cannot be so: positions = 'relative' moves keys"):
        CacheOptions(kv="int8-attention", **RELATIVE).policy(rollout, None)


def test_codecs_are_chosen_on_calibration_videos_that_are_left_as_they_were(rollout):
    before = rollout.sampler
    policy = CacheOptions(kv="auto", kv_bits=2.5).policy(rollout, rollout)
    assert len(policy.keys) == len(policy.values) == 4 and rollout.sampler == before
    with pytest.raises(AdapterError, match="pass a smaller --span"):
        exact_caches(rollout, 20)
    assert rollout.sampler == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "kvi2"}, "--kv kvi2: did you mean 'kivi2'. There are auto, rtn2"),
        ({"kv": "auto"}, "pass --prompts, or name a codec"),
        ({"kv": "qvg", "kv_bits": 2.0}, "the budget of --kv auto"),
        ({"positions": "relative"}, "cannot be so: .*needs a window"),
        ({"absorb": 0.5}, "cannot be so: .*set sink to a chunk, 3 frames"),
        ({"kv": "qvg", "window": 9, "span": 4}, "a window of at least 18, or a smaller span"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_do(rollout, options, message):
    with pytest.raises(AdapterError, match=message):
        CacheOptions(**options).policy(rollout, None)


def test_a_loop_of_another_kind_has_no_such_cache():
    with pytest.raises(AdapterError, match="--window: Doubling has no fxq cache"):
        CacheOptions(window=9).policy(doubling(), None)


@pytest.mark.sweep
def test_a_bundle_keeps_what_was_asked_for_and_generates_on_it(tmp_path):
    out, words = tmp_path / "b", ["--positions", "relative", "--window", "21", "--sink", "3", "--absorb", "0.5"]
    done = RUN.invoke(
        app, ["quantize", "--out", str(out), "-r", "w8a8-dynamic", "-n", "1", "-q", "--json", "--kv", "klt1", *words]
    )
    assert done.exit_code == 0, done.output
    policy = policy_of(fxq.load(out))
    assert policy == CachePolicy(**RELATIVE, span=2, keys=Klt(1.0), values=Klt(1.0), absorb=Absorb(ratio=0.5))
    video = ["generate", "--out", str(tmp_path / "v.gif"), "--json"]
    done = RUN.invoke(app, [*video, "--bundle", str(out), "--chunks", "9"])
    assert done.exit_code == 0 and json.loads(done.stdout)["scores"]["shape"] == 1
    done = RUN.invoke(app, [*video, "--bundle", str(out), "--kv", "qvg"])
    assert isinstance(done.exception, AdapterError) and "by its recipe: leave out --kv" in str(done.exception)
    done = RUN.invoke(app, [*video, "--chunks", "9", *words])  # the float model absorbs too
    assert done.exit_code == 0 and json.loads(done.stdout)["scores"]["shape"] == 1


@pytest.mark.sweep
def test_a_bundle_with_a_calibrated_codec_needs_no_other_option(tmp_path):
    out, page = tmp_path / "b", tmp_path / "cache.html"
    words = ["quantize", "--out", str(out), "-r", "w8a8-dynamic", "-n", "2", "-q", "--json", "--kv", "klt1-model"]
    words += ["--report", str(page)]
    done = RUN.invoke(app, words)
    assert done.exit_code == 0, done.output
    assert policy_of(fxq.load(out)).keys == Klt(1.0, fit="model")
    assert "Cache of tiny, w8a8-dynamic" in page.read_text()
    done = RUN.invoke(app, ["generate", "--out", str(tmp_path / "v.gif"), "--json", "--bundle", str(out)])
    assert done.exit_code == 0 and json.loads(done.stdout)["scores"]["shape"] == 1
    done = RUN.invoke(app, ["generate", "--out", str(tmp_path / "v.gif"), "--json", "--kv", "klt1-model"])
    assert done.exit_code == 0 and json.loads(done.stdout)["scores"]["shape"] == 1


def test_a_report_without_a_cache_is_refused_before_the_work(tmp_path):
    words = ["quantize", "--out", str(tmp_path / "b"), "-q", "--report", str(tmp_path / "r.html")]
    done = RUN.invoke(app, words)
    assert isinstance(done.exception, AdapterError) and "needs a cache: pass --kv or --absorb" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_a_model_of_diffusers_has_no_such_cache(tmp_path):
    done = RUN.invoke(app, ["quantize", "--out", str(tmp_path / "b"), "-m", "diffusers", "--kv", "klt1"])
    assert isinstance(done.exception, AdapterError)
    assert "--kv: models of diffusers keep no fxq cache" in str(done.exception)
