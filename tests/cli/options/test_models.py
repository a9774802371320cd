import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import save_file

import fxq
from fxq.cli.options.models import AdapterError, ModelFiles, find_family, make_rollout, parse_settings
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.checkpoints import CheckpointError
from fxq.models.families import FAMILIES
from fxq.models.prompts import PromptError
from fxq.presets import with_iterations

SETTINGS = {
    "dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 20, "text_len": 5,
    "in_dim": 4, "out_dim": 4, "model_type": "t2v",
}  # fmt: skip
CONFIG = CausalWanConfig(**{k: v for k, v in SETTINGS.items() if k != "model_type"})


@pytest.fixture
def published(tmp_path):
    """A checkpoint in the published form, prompts and a config.json."""
    state = {f"model.{name}": tensor for name, tensor in CausalWan(CONFIG).state_dict().items()}
    torch.save({"generator_ema": state}, tmp_path / "model.pt")
    save_file({"cat": torch.randn(3, 20), "dogs": torch.randn(2, 5, 20)}, tmp_path / "prompts.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    return tmp_path


def files(folder, **options):
    sizes = {"frames": 6, "height": 4, "width": 6} | options
    return ModelFiles(checkpoint=folder / "model.pt", prompts=str(folder / "prompts.safetensors"), **sizes)


def test_a_checkpoint_with_a_config_file_beside_it_generates_a_video(published):
    rollout = make_rollout("causal-wan", 5, 7, files(published, batch=2))
    assert [draws.seeds for _, draws in rollout.batches] == [(7000, 7001), (7002, 7003), (7004,)]
    first, last = rollout.batches[0][0]["prompt_embeds"], rollout.batches[1][0]["prompt_embeds"]
    assert first.shape == (2, 5, 20)
    assert torch.equal(first[0], last[1]), "prompt 3 of 3 is prompt 0 again"
    assert rollout.rollout(*rollout.batches[2]).shape == (1, 6, 4, 4, 6)


def test_sizes_come_from_a_named_file_or_from_settings(published):
    (published / "config.json").rename(published / "sizes.json")
    assert find_family("causal-wan", files(published, config=published / "sizes.json")).config == CONFIG
    assert find_family("causal-wan", files(published, settings=SETTINGS)).config == CONFIG
    other = files(published, config=published / "sizes.json", settings={"num_layers": 5, "num_frame_per_block": 1})
    family = find_family("causal-wan", other)
    assert (family.config.num_layers, family.sampler.frames_per_chunk) == (5, 1)
    seen = {"num_heads": CONFIG.num_heads, "text_len": CONFIG.text_len}
    assert find_family("causal-wan", files(published, settings=seen)).config == CONFIG, "the shapes show the rest"
    with pytest.raises(AdapterError, match=r"all sizes but the number of heads: say --set num_heads=N, or --config"):
        find_family("causal-wan", files(published))
    save_file({"a": torch.ones(2)}, published / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json is no readable JSON"):
        find_family("causal-wan", dataclasses.replace(files(published), checkpoint=published / "other.safetensors"))


def test_a_family_has_its_published_sizes_where_nothing_else_is_said():
    family = find_family("longlive", ModelFiles())
    assert (family.frames, family.latent) == (120, (16, 60, 104))
    assert family == FAMILIES["longlive"]


@pytest.mark.slow
def test_a_published_checkpoint_is_quantized(published):
    rollout = make_rollout("causal-wan", 2, 0, files(published, batch=2))
    chosen = with_iterations(fxq.PRESETS["w8a8"], 20)
    module = fxq.quantize(rollout.denoiser, rollout, chosen, progress=False)
    assert fxq.summary(module).facts["recipe"]["name"] == "w8a8"
    with rollout.using(module):
        video = rollout.rollout(*rollout.batches[0])
    want = rollout.rollout(*rollout.batches[0])
    assert (video - want).pow(2).mean() < 0.01 * want.pow(2).mean()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_says_which_files_it_needs_and_where_they_are_published(name):
    with pytest.raises(
        AdapterError, match=re.escape(f"needs checkpoint; its weights are published as {FAMILIES[name].source}")
    ):
        make_rollout(name, 1, 0)
    with pytest.raises(AdapterError, match="needs prompts"):
        make_rollout("self-forcing", 1, 0, ModelFiles(checkpoint="model.pt"))


def test_a_checkpoint_of_another_size_is_refused_with_the_closest_family(published):
    settings = {"text_dim": 20, "text_len": 5}
    with pytest.raises(CheckpointError, match="does not hold self-forcing"):
        make_rollout("self-forcing", 1, 0, files(published, settings=settings))


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"frames": 7}, AdapterError, r"0 given and 7 generated frames.*choose another number of frames"),
        ({"width": 7}, AdapterError, r"latents of 4 x 7 are not whole patches of 2 x 2"),
        ({"dtype": "int8"}, AdapterError, "dtype 'int8': expected one of float32, bfloat16, float16"),
        ({"settings": {**SETTINGS, "text_dim": 21}}, PromptError, r"\[3, 20\], expected .*\[tokens, 21\]"),
        ({"settings": {**SETTINGS, "wide": 1}}, CheckpointError, "unknown settings wide"),
    ],
)
def test_what_does_not_fit_is_refused(published, options, error, reason):
    with pytest.raises(error, match=reason):
        make_rollout("causal-wan", 1, 0, files(published, **options))


def test_the_dtype_can_be_chosen(published):
    rollout = make_rollout("causal-wan", 1, 0, files(published, dtype="bfloat16"))
    assert {p.dtype for p in rollout.denoiser.parameters()} == {torch.bfloat16}


def test_the_shipped_model_takes_no_files():
    assert make_rollout("tiny", 2, 0).batches[0][1].batch == 2
    with pytest.raises(AdapterError, match="'tiny' takes no files; a checkpoint needs one of: self-forcing"):
        make_rollout("tiny", 2, 0, ModelFiles(checkpoint="model.pt"))


MODULE = """
from fxq.cli.options.models import make_rollout
def rollout(videos, seed): return make_rollout("tiny", videos, seed)
def nothing(videos, seed): return 3
"""


def test_a_function_of_the_user_gives_the_rollout(tmp_path, monkeypatch):
    (tmp_path / "model_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(make_rollout("model_of_a_test:rollout", 1, 0), fxq.Rollout)
    with pytest.raises(AdapterError, match=r"returned int, expected a fxq\.Rollout"):
        make_rollout("model_of_a_test:nothing", 1, 0)
    with pytest.raises(AdapterError, match="no attribute 'absent'"):
        make_rollout("model_of_a_test:absent", 1, 0)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(AdapterError, match=r"unknown model 'wan': expected 'tiny', one of self-forcing, .*causal-wan"):
        make_rollout("wan", 1, 0)
    with pytest.raises(AdapterError, match="unknown family 'tiny'"):
        find_family("tiny", ModelFiles())


def test_settings_are_read_from_words():
    words = ["dim=24", "denoising_step_list=[1000, 500]", "model_type=t2v", "warp_denoising_step=false"]
    assert parse_settings(words) == {
        "dim": 24, "denoising_step_list": [1000, 500], "model_type": "t2v", "warp_denoising_step": False,
    }  # fmt: skip
    for word in ("dim", "=3"):
        with pytest.raises(AdapterError, match=f"setting '{word}': expected NAME=VALUE"):
            parse_settings([word])
