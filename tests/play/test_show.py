import math

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fxq.cli import app
from fxq.cli.play import EXAMPLE
from fxq.comparison.bundles.contestant import FULL_PRECISION
from fxq.play import show as shows
from fxq.play.show import MAX_CHUNKS, AskedError, Show

OTHER = "cross blue left fast black row1 column2"


def played(show, chunks):
    return [show.next_chunk() for _ in range(chunks)]


def test_both_panels_show_what_generate_writes(stage, bundle, tmp_path):
    show = Show(stage, [FULL_PRECISION, bundle.name], EXAMPLE, 3, stage.chunks)
    played(show, stage.chunks)
    assert show.ended
    film = show.film()
    half = film.shape[2] // 2
    for panel, given in enumerate(([], ["--bundle", str(bundle)])):
        out = tmp_path / f"{panel}.png"
        command = ["generate", "--out", str(out), "--prompt", EXAMPLE, "--seed", "3", "--scale", "1", *given]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        with Image.open(out) as video:
            frames = []
            for number in range(video.n_frames):
                video.seek(number)
                frames.append(np.asarray(video.convert("RGB")))
        assert np.array_equal(np.stack(frames), film[:, :, half * panel : half * (panel + 1)])


def test_a_chunk_says_what_it_cost(stage, bundle):
    show = Show(stage, [FULL_PRECISION, bundle.name], EXAMPLE, 0, 2)
    first, second = played(show, 2)
    for exact, quantized in (first, second):
        assert exact.decibels is None and 20 < quantized.decibels < 100
        assert exact.seconds > 0 and exact.frames.dtype == np.uint8 and exact.frames.shape[3] == 3
    assert second[0].cache_bytes > first[0].cache_bytes > 0
    assert stage.weight_bytes(stage.contestants[bundle.name]) < stage.weight_bytes(stage.contestants[FULL_PRECISION])


def test_the_same_model_twice_is_equal_and_without_full_precision_nothing_is_compared(stage, bundle):
    shown = Show(stage, [FULL_PRECISION, FULL_PRECISION], EXAMPLE, 0, 1).next_chunk()
    assert [part.decibels for part in shown] == [None, None]
    assert np.array_equal(shown[0].frames, shown[1].frames)
    shown = Show(stage, [bundle.name], EXAMPLE, 0, 1).next_chunk()
    assert [part.decibels for part in shown] == [None]


def test_an_equal_bundle_is_infinitely_near(stage, bundle, monkeypatch):
    monkeypatch.setattr(shows.torch, "equal", lambda a, b: True)
    assert Show(stage, [FULL_PRECISION, bundle.name], EXAMPLE, 0, 1).next_chunk()[1].decibels == math.inf


def test_another_prompt_changes_what_comes_and_not_what_was(stage):
    plain, changed = (Show(stage, [FULL_PRECISION], EXAMPLE, 5, 3) for _ in range(2))
    assert np.array_equal(plain.next_chunk()[0].frames, changed.next_chunk()[0].frames)
    with pytest.raises(AskedError, match="needs exactly one"):
        changed.ask("ring")
    changed.ask(OTHER)
    assert not np.array_equal(plain.next_chunk()[0].frames, changed.next_chunk()[0].frames)
    assert torch.equal(changed.panels[0].state.latents[:, :3], plain.panels[0].state.latents[:, :3])


def test_a_video_without_an_end_keeps_its_cache_bounded(stage, monkeypatch):
    monkeypatch.setattr(shows, "KEPT_FRAMES", 12)
    show = Show(stage, [FULL_PRECISION], EXAMPLE, 0, 0)
    assert show.chunks == MAX_CHUNKS
    sizes = [shown[0].cache_bytes for shown in played(show, 11)]
    assert sizes[-1] == sizes[-2] == max(sizes)
    assert 12 <= len(show.film()) < 12 + 3


@pytest.mark.parametrize(
    ("names", "prompt", "seed", "chunks", "message"),
    [
        ([], EXAMPLE, 0, 1, "expected one or two of full precision"),
        ([FULL_PRECISION] * 3, EXAMPLE, 0, 1, "expected one or two"),
        (["/etc/passwd"], EXAMPLE, 0, 1, "expected one or two of full precision, w8a8-dynamic"),
        ([FULL_PRECISION], "a dog", 0, 1, "needs exactly one"),
        ([FULL_PRECISION], "x" * 2001, 0, 1, "at most 2000 characters"),
        ([FULL_PRECISION], EXAMPLE, -1, 1, "seed -1"),
        ([FULL_PRECISION], EXAMPLE, 0, MAX_CHUNKS + 1, f"{MAX_CHUNKS + 1} chunks"),
    ],
)
def test_what_cannot_be_is_refused(stage, names, prompt, seed, chunks, message):
    with pytest.raises(AskedError, match=message):
        Show(stage, names, prompt, seed, chunks)


def test_the_end_is_the_end(stage):
    show = Show(stage, [FULL_PRECISION], EXAMPLE, 0, 1)
    with pytest.raises(AskedError, match="no frame yet"):
        show.film()
    show.next_chunk()
    with pytest.raises(AskedError, match="has 1 chunks and is at its end"):
        show.next_chunk()
