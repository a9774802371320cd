import sys

import numpy as np
import pytest
from PIL import Image

from fxq.report.video import FORMATS, VideoError, check_format, video_writer, write_video


def frames(count=5, height=6, width=7):
    """A white square that moves to the right on blue."""
    made = np.zeros((count, height, width, 3), np.uint8)
    made[..., 2] = 200
    for i in range(count):
        made[i, 2:4, i : i + 2] = 255
    return made


@pytest.mark.parametrize("suffix", [s for s in FORMATS if s != ".mp4"])
def test_animated_pictures_hold_every_frame_enlarged(suffix, tmp_path):
    with Image.open(write_video(tmp_path / f"v{suffix}", frames(), scale=3)) as image:
        assert image.n_frames == 5 and image.size == (21, 18)


@pytest.mark.parametrize("scale", [1, 8])
def test_mp4_is_played_back_as_it_was_also_of_odd_sides(scale, tmp_path):
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "deep" / "v.mp4", frames(height=5), frames_per_second=16, scale=scale)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate, pixels = float(stream.average_rate), stream.pix_fmt
        got = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    want = frames(height=5).repeat(scale, 1).repeat(scale, 2)
    assert rate == 16 and pixels == "yuv420p"
    assert got.shape == (5, *(side + side % 2 for side in want.shape[1:3]), 3)
    error = np.abs(got[:, : want.shape[1], : want.shape[2]].astype(float) - want)
    assert error.mean() < (25 if scale == 1 else 6)  # colours have half the resolution


def test_other_names_are_refused_with_those_that_can_be(tmp_path):
    with pytest.raises(VideoError, match=r"v\.avi: videos are written as \.gif, \.webp, \.png, \.mp4; choose such"):
        write_video(tmp_path / "v.avi", frames())


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoError, match=r'pip install "fxq\[video\]", or choose \.webp'):
        check_format(tmp_path / "v.mp4")


@pytest.mark.parametrize("suffix", FORMATS)
def test_frames_may_come_in_pieces(suffix, tmp_path):
    if suffix == ".mp4":
        pytest.importorskip("av")
    whole, pieces = tmp_path / f"whole{suffix}", tmp_path / f"pieces{suffix}"
    write_video(whole, frames(7))
    with video_writer(pieces) as write:
        for start, end in ((0, 1), (1, 4), (4, 7)):
            write(frames(7)[start:end])
            assert not pieces.exists(), "readers see nothing before it is whole"
    assert pieces.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_a_video_that_was_not_finished_or_has_no_frame_leaves_no_file(suffix, tmp_path):
    if suffix == ".mp4":
        pytest.importorskip("av")
    with pytest.raises(KeyError), video_writer(tmp_path / f"v{suffix}") as write:
        write(frames())
        raise KeyError
    with pytest.raises(VideoError, match="there is no frame to write"), video_writer(tmp_path / f"v{suffix}"):
        pass
    assert not list(tmp_path.iterdir())
