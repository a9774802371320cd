import pathlib
import subprocess
import sys

import pytest
import torch

from fxq.cli.options.models import AdapterError, ModelFiles
from fxq.cli.options.videos import VideoFiles
from fxq.models.video.decoding import PixelDecoder
from tests import wan

CPU = torch.device("cpu")


def test_a_pipeline_gives_what_was_not_given():
    video, pipe = VideoFiles(pipeline=pathlib.Path("pipe")), pathlib.Path("pipe")
    assert video.filled_in("self-forcing", ModelFiles()) == ModelFiles(text_encoder=pipe)
    assert video.filled_in("causal-wan", ModelFiles()).checkpoint == pipe / "transformer"
    given = ModelFiles(text_encoder=pathlib.Path("t5"), checkpoint=pathlib.Path("c.pt"))
    assert video.filled_in("causal-wan", given) == given
    assert VideoFiles().filled_in("causal-wan", given) is given
    with pytest.raises(AdapterError, match="model 'tiny' is no part of a pipeline"):
        video.filled_in("tiny", ModelFiles())


def test_the_decoder_is_the_vae_before_the_pipelines(tmp_path):
    pytest.importorskip("diffusers")
    wan.vae().save_pretrained(tmp_path / "vae")
    video = VideoFiles(vae=tmp_path / "vae", pipeline=tmp_path / "no-pipeline")
    assert video.has_decoder("causal-wan") and video.decoder("causal-wan", CPU).channels == wan.CHANNELS


def test_the_shipped_model_needs_none_and_others_one():
    assert VideoFiles().has_decoder("tiny") and not VideoFiles().has_decoder("self-forcing")
    assert isinstance(VideoFiles().decoder("tiny", CPU), PixelDecoder)
    with pytest.raises(AdapterError, match="makes frames, not latents: leave out --vae"):
        VideoFiles(vae=pathlib.Path("vae")).decoder("tiny", CPU)
    with pytest.raises(AdapterError, match="model 'self-forcing' makes latents: --vae"):
        VideoFiles().decoder("self-forcing", CPU)


def test_videos_have_the_pace_of_their_model():
    paces = VideoFiles().pace("tiny"), VideoFiles().pace("longlive"), VideoFiles(fps=24).pace("tiny")
    assert paces == (8, 16, 24)
    assert VideoFiles(fps=24, vae=pathlib.Path("v")).given == "--vae, --fps" and not VideoFiles().given


def test_neither_fxq_nor_its_commands_import_diffusers_or_transformers():
    code = (
        "import sys, fxq, fxq.cli, fxq.cli.generate, fxq.cli.compare, fxq.cli.quantize\n"
        "print({'diffusers', 'transformers', 'ftfy', 'av'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
