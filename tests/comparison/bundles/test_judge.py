import numpy as np
import pytest
import torch
from PIL import Image

from fxq.comparison.bundles.judge import Clips, judge
from fxq.comparison.bundles.runs import Run
from fxq.metrics.latents import psnr
from fxq.metrics.similarity import ssim
from fxq.models.video.decoding import PixelDecoder
from fxq.models.video.vae import WanDecoder
from tests import wan


def run(free, forced=None):
    return Run(free=free, forced=forced, seconds=(1.0,) * 3, peak=1)


def videos(channels=3, frames=6):
    torch.manual_seed(0)
    want = torch.rand(frames, channels, 6, 8) * 1.6 - 0.8
    return want, want + 0.02 * torch.randn_like(want), want + 0.01 * torch.randn_like(want)


def test_without_a_decoder_latents_are_compared_between_their_extremes(tmp_path):
    want, free, forced = (7 * video for video in videos())
    verdict = judge(run(want), {"b": run(free, forced)}, 2, None, None, "001")
    limits = float(want.min()), float(want.max())
    for i in range(3):
        part = slice(2 * i, 2 * i + 2)
        assert verdict.bundles["b"].free[i] == pytest.approx(psnr(free[None, part], want[None, part], *limits)[0])
        assert verdict.bundles["b"].forced[i] == pytest.approx(psnr(forced[None, part], want[None, part], *limits)[0])
    assert verdict.bundles["b"].ssim == pytest.approx(ssim(free[None], want[None], *limits)[0]) and not verdict.clip


def test_a_constant_video_has_a_range_too():
    flat = torch.zeros(2, 3, 6, 8)
    verdict = judge(run(flat), {"b": run(flat, flat)}, 2, None, None, "001")
    assert verdict.bundles["b"].forced.tolist() == [100.0]


def test_chunks_from_full_precisions_history_are_decoded_after_its_frames():
    pytest.importorskip("diffusers")
    decoder = WanDecoder(wan.vae())
    want, free, _ = videos(wan.CHANNELS)
    free = want + 0.5 * torch.randn_like(want)
    forced = torch.cat((free[:2], want[2:4], free[4:]))
    verdict = judge(run(want), {"b": run(free, forced), "same": run(want, want)}, 2, decoder, None, "001")
    mixed = torch.cat((want[:2], want[2:4], free[4:]))

    def decoded(latents):
        return decoder.begin().decode(latents[None])[0]

    truth, shown, alone = decoded(want), decoded(free), decoded(mixed)
    assert verdict.bundles["b"].forced[1] == 100.0, "the same latents after the same frames"
    assert verdict.bundles["b"].forced[2] == pytest.approx(psnr(alone[None, 13:], truth[None, 13:])[0], abs=0.01)
    assert verdict.bundles["b"].free[2] == pytest.approx(psnr(shown[None, 13:], truth[None, 13:])[0], abs=0.01)
    assert verdict.bundles["b"].free[1] < 60, "the decoder remembers the chunk before"
    assert verdict.bundles["same"].free.tolist() == verdict.bundles["same"].forced.tolist() == [100.0] * 3
    assert verdict.bundles["same"].ssim == pytest.approx(1)


def test_every_version_and_the_side_by_side_are_written_and_handed_on(tmp_path):
    want, free, forced = videos()
    seen = []
    clips = Clips(
        folder=tmp_path,
        suffix=".webp",
        frames_per_second=8,
        edge=12,
        keep=lambda name, frames: seen.append((name, frames)),
    )
    others = {"a/b": run(free, forced), "c": run(want, want)}
    verdict = judge(run(want), others, 2, PixelDecoder(), clips, "007")
    assert verdict.clip == "side_by_side/007.webp" and len(verdict.decoding) == 3
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.webp")} == {
        "side_by_side/007.webp", "full_precision/007.webp", "a_b/007.webp", "c/007.webp",
    }  # fmt: skip
    with Image.open(tmp_path / verdict.clip) as shown:
        assert shown.n_frames == 6 and shown.size == (3 * 16 + 2 * 4, 2 * (20 + 12))
    with Image.open(tmp_path / "c" / "007.webp") as shown:
        assert shown.size == (16, 12)
        first = np.asarray(shown.convert("RGB"))[::2, ::2]
    kept = np.concatenate([frames for name, frames in seen if name == "full precision"])
    assert kept.shape == (6, 6, 8, 3) and np.array_equal(first, kept[0])
    assert np.abs(kept[0].astype(float) - (want[0].permute(1, 2, 0).numpy() + 1) * 127.5).max() <= 0.51
