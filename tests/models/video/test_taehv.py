"""The reference below walks over frames one by one, as the published decoder's sequential form does."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fxq.models.checkpoints import CheckpointError
from fxq.models.video.taehv import load_tae
from fxq.models.video.vae import load_decoder

WIDTHS = (8, 6, 4, 4)


def weights(factors=(1, 2, 2), patch=1, latents=16, dtype=torch.float32):
    """Tensors in the form of the published file, its encoder among them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).mul(0.8 / (shape[1] * shape[2] * shape[3]) ** 0.5).to(dtype)

    found = {"1.weight": normal(WIDTHS[0], latents, 3, 3), "1.bias": torch.full((WIDTHS[0],), 0.1, dtype=dtype)}
    place = 3
    for width, wider, factor in zip(WIDTHS, WIDTHS[1:], factors, strict=False):
        for _ in range(3):
            for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                found[f"{place}.conv.{layer}.weight"] = normal(width, inputs, 3, 3)
                found[f"{place}.conv.{layer}.bias"] = torch.zeros(width, dtype=dtype)
            place += 1
        found[f"{place + 1}.conv.weight"] = normal(width * factor, width, 1, 1)
        found[f"{place + 2}.weight"] = normal(wider, width, 3, 3)
        place += 3
    found[f"{place + 1}.weight"] = normal(3 * patch**2, WIDTHS[-1], 3, 3)
    found[f"{place + 1}.bias"] = torch.full((3 * patch**2,), 0.4, dtype=dtype)
    return {f"decoder.{name}": tensor for name, tensor in found.items()} | {"encoder.0.weight": torch.ones(2)}


def reference(tensors, latents, patch=1):
    """Frames 0..1 of one video [F, C, H, W], none left out at the beginning."""

    def conv(name, x):
        weight = tensors[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, tensors.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    frames = [torch.relu(conv("1", 3 * torch.tanh(frame / 3))) for frame in latents[:, None]]
    for place in (3, 9, 15):
        for block in range(place, place + 3):
            before, after = torch.zeros_like(frames[0]), []
            for frame in frames:
                inner = torch.cat((frame, before), 1)
                for layer in (0, 2, 4):
                    inner = conv(f"{block}.conv.{layer}", inner)
                    inner = inner if layer == 4 else torch.relu(inner)
                after.append(torch.relu(inner + frame))
                before = frame
            frames = after
        frames = [conv(f"{place + 4}.conv", F.interpolate(frame, scale_factor=2)) for frame in frames]
        width = tensors[f"decoder.{place + 5}.weight"].shape[1]
        frames = [conv(f"{place + 5}", part) for frame in frames for part in frame.split(width, 1)]
    return torch.cat([F.pixel_shuffle(conv("22", torch.relu(frame)), patch).clamp(0, 1) for frame in frames])


@pytest.mark.parametrize(("factors", "patch", "latents"), [((1, 2, 2), 1, 16), ((1, 2, 2), 2, 48), ((2, 2, 2), 1, 16)])
def test_a_streamed_decode_is_that_of_frame_by_frame(factors, patch, latents, tmp_path):
    tensors = weights(factors, patch, latents, torch.float64)
    save_file(tensors, tmp_path / "taew2_1.safetensors")
    videos = 2 * torch.randn(2, 7, latents, 3, 4, dtype=torch.float64)
    decoder = load_decoder(tmp_path / "taew2_1.safetensors")
    assert decoder.channels == latents
    stream = decoder.begin()
    parts = [stream.decode(part) for part in videos.split([1, 3, 3], dim=1)]
    late = factors[0] * factors[1] * factors[2] - 1
    assert parts[0].shape == (2, 1, 3, 3 * 8 * patch, 4 * 8 * patch)
    for video, got in zip(videos, torch.cat(parts, 1), strict=True):
        want = reference(tensors, video, patch)[late:] * 2 - 1
        assert want.std() > 0.05 and (want.abs() < 1).double().mean() > 0.5
        assert torch.allclose(got.double(), want, atol=1e-6)


def test_a_fork_goes_on_alone(tmp_path):
    torch.save(weights(), tmp_path / "taew2_1.pth")
    stream = load_tae(tmp_path / "taew2_1.pth").begin()
    videos = torch.randn(1, 6, 16, 3, 4)
    stream.decode(videos[:, :3])
    fork = stream.fork()
    assert not torch.equal(fork.decode(2 * videos[:, 3:]), stream.fork().decode(videos[:, 3:]))
    assert torch.equal(stream.fork().decode(videos[:, 3:]), stream.decode(videos[:, 3:]))


def test_other_dtypes_come_out_as_float32(tmp_path):
    save_file(weights(dtype=torch.float16), tmp_path / "t.safetensors")
    frames = load_tae(tmp_path / "t.safetensors", dtype=torch.bfloat16).begin().decode(torch.randn(1, 2, 16, 3, 4))
    assert frames.dtype == torch.float32 and frames.abs().max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.7.conv.weight"), r"no TAEHV decoder: decoder\.7\.conv\.weight is not in it"),
        (lambda t: t.pop("decoder.4.conv.2.bias"), r"missing: 4\.conv\.2\.bias"),
        (lambda t: t.update({"decoder.4.skip.weight": torch.ones(1)}), r"unexpected: 4\.skip\.weight"),
        (lambda t: t.update({"decoder.9.conv.0.weight": torch.ones(1)}), r"of another shape: 9\.conv\.0\.weight"),
        (lambda t: t.update({"decoder.13.conv.weight": torch.ones(18, 6, 1, 1)}), r"make \[1, 3, 2\] frames of one"),
    ],
)
def test_what_is_no_such_decoder_is_refused(change, message, tmp_path):
    tensors = weights()
    change(tensors)
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_tae(tmp_path / "t.safetensors")
