"""``fxq generate`` with a published model; tests/cli/test_cli.py and test_cache.py have the shipped one."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import fxq
from fxq.cli import app
from fxq.cli import generate as command
from fxq.cli.options.models import AdapterError, ModelFiles, make_rollout
from tests import published, wan
from tests.cuda import fake_cuda

pytest.importorskip("diffusers")
av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return wan.folders(tmp_path_factory)


def generate(*words):
    done = CliRunner().invoke(app, ["generate", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def frames_of(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), float(stream.average_rate)


def by_the_pipelines_own_classes(pipe_folder, bundle, prompt):
    """Latents and frames of the same prompt and noise: diffusers' pipeline encodes and decodes in one piece."""
    import diffusers

    pipe = diffusers.WanPipeline.from_pretrained(pipe_folder)
    embeddings, _ = pipe.encode_prompt([prompt], do_classifier_free_guidance=False, max_sequence_length=512)
    files = ModelFiles(
        checkpoint=pipe_folder / "transformer", texts=(prompt,), text_encoder=pipe_folder,
        frames=6, height=4, width=6, device="cpu",
    )  # fmt: skip
    rollout = make_rollout("causal-wan", 1, 3, files)
    _, draws = rollout.batches[0]
    with rollout.using(rollout.denoiser if bundle is None else fxq.optimize(fxq.load(bundle))):
        latents = rollout.rollout({"prompt_embeds": embeddings}, draws)
    config = pipe.vae.config
    mean, deviation = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        decoded = pipe.vae.decode(latents.transpose(1, 2) * deviation + mean, return_dict=False)[0]
    return latents[0], ((decoded[0].permute(1, 2, 3, 0) + 1) * 127.5).round().numpy()


def test_words_become_the_video_that_the_pipelines_own_classes_make(made, tmp_path):
    pipe, bundle = made
    words = [*wan.LOOP, "--pipeline", pipe, "--prompt", "a red cat", "--seed", "3"]
    generate(*words, "--bundle", bundle, "--out", tmp_path / "v.mp4", "--fps", "24", "--scale", "2")
    latents, want = by_the_pipelines_own_classes(pipe, bundle, "a red cat")
    got, rate = frames_of(tmp_path / "v.mp4")
    assert got.shape == (21, 64, 96, 3) and rate == 24
    assert want.std() > 5
    assert np.abs(got[:, ::2, ::2] - want).mean() < 0.1 * want.std() + 3, "H.264 with half the resolution of colours"
    told = json.loads(generate(*words, "--bundle", bundle, "--out", tmp_path / "l.safetensors", "--json"))
    assert (told["prompt"], told["latent_frames"]) == ("a red cat", 6)
    with safe_open(tmp_path / "l.safetensors", "pt") as file:
        found = file.get_tensor("latents")
        assert file.metadata() == {"prompt": "a red cat"}
    assert found.shape == (6, wan.CHANNELS, 4, 6)
    assert torch.allclose(found, latents, atol=1e-4)


def test_encoder_and_decoder_may_lie_apart_and_prompts_in_a_file(made, tmp_path):
    pipe, _ = made
    (tmp_path / "p.txt").write_text("a dog sits\na cat\n")
    words = [*wan.LOOP, "--checkpoint", pipe / "transformer", "--text-encoder", pipe / "text_encoder"]
    shown = generate(
        *words, "--vae", pipe / "vae", "--prompts", tmp_path / "p.txt", "--chunks", "1", "--out", tmp_path / "v.webp"
    )
    assert "v.webp" in shown and (tmp_path / "v.webp").stat().st_size > 1000


def test_embeddings_do_and_latents_need_no_decoder(tmp_path):
    words = published.options(tmp_path)
    generate(*words, "--out", tmp_path / "l.safetensors", "--chunks", "3")
    with safe_open(tmp_path / "l.safetensors", "pt") as file:
        assert file.get_tensor("latents").shape == (9, 4, 4, 6)
    with pytest.raises(AdapterError, match=r"makes latents: show them with --vae, .* or write them to a \.safetensors"):
        generate(*words, "--out", tmp_path / "v.gif")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "mine:f"], "model 'mine:f'.*makes latents|expected 'tiny' or one of"),
        (["--model", "self-forcing", "--vae", "nowhere"], "nowhere is no folder"),
        (["--frames", "9"], "model 'tiny' takes no files"),
        (["--vae", "v"], "model 'tiny' makes frames, not latents"),
        (["--floats-where-faster"], "measures the layers of a bundle: give --bundle, or leave it out"),
        (["--cuda-graphs", "--device", "cpu"], "replays calls on a GPU, and the model runs on cpu: leave it out"),
    ],
)
def test_what_cannot_be_is_refused(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        generate(*words, "--out", tmp_path / "v.gif")


def test_a_decoder_of_other_latents_is_refused(made, tmp_path):
    pipe, _ = made
    words = published.options(tmp_path)
    with pytest.raises(AdapterError, match="takes latents of 16 channels, model 'causal-wan' makes 4"):
        generate(*words, "--vae", pipe, "--out", tmp_path / "v.gif")
    with pytest.raises(AdapterError, match="makes embeddings of width 24, the model takes 20"):
        generate(*words, "--vae", pipe, "--text-encoder", pipe, "--prompt", "a cat", "--out", tmp_path / "v.gif")
    with pytest.raises(AdapterError, match="prompts in words need the model's text encoder: --text-encoder"):
        generate(*words, "--vae", pipe, "--prompt", "a cat", "--out", tmp_path / "v.gif")


def test_calls_are_replayed_from_graphs_where_they_are_asked_for(tmp_path, monkeypatch):
    graphs = fake_cuda(monkeypatch)
    monkeypatch.setattr(command, "_check_graphs", lambda device, report: None)
    words = published.options(tmp_path)
    for name, more in (("eager", []), ("graphs", ["--cuda-graphs"])):
        generate(*words, *more, "--out", tmp_path / f"{name}.safetensors", "--chunks", "2")
        assert bool(graphs.made) == bool(more)
    eager, replayed = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in ("eager", "graphs"))
    assert torch.equal(eager, replayed)


def test_a_report_is_made_without_graphs(tmp_path):
    with pytest.raises(AdapterError, match="--report measures calls one by one, without graphs"):
        command._check_graphs(torch.device("cuda"), tmp_path / "report")
    command._check_graphs(torch.device("cuda"), None)
