"""TAEHV: a small decoder of Wan's latents (github.com/madebyollin/taehv), without its encoder.

Blocks of 2-D convolutions that see the frame before; its file has names ``decoder.N`` of one sequence of layers.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.models.checkpoints import CheckpointError, compact, read_raw
from fxq.models.video.decoding import VideoDecoder, VideoStream

_WIDTHS = (256, 128, 64, 64)
_BLOCKS = 3
_PREFIX = "decoder."


class _Soft(nn.Module):
    """Latents softly limited to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Remembering(nn.Module):
    """A residual block of a frame and the one before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (2 * channels, channels, channels):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """``x`` and ``before`` [N, C, H, W]."""
        return F.relu(self.conv(torch.cat((x, before), dim=1)) + x)


class _MoreFrames(nn.Module):
    """Each frame [N, C, H, W] becomes ``factor`` frames, in order."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels, channels * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


def _decoder(latents: int, factors: tuple[int, ...], outputs: int, widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = [_Soft(), nn.Conv2d(latents, widths[0], 3, padding=1), nn.ReLU()]
    for inputs, width, factor in zip(widths, widths[1:], factors, strict=False):
        layers += [_Remembering(inputs) for _ in range(_BLOCKS)]
        layers += [nn.Upsample(scale_factor=2), _MoreFrames(inputs, factor)]
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], outputs, 3, padding=1))


_STAGE = _BLOCKS + 3
_GROWS = tuple(3 + stage * _STAGE + _BLOCKS + 1 for stage in range(len(_WIDTHS) - 1))
_LAST = 3 + (len(_WIDTHS) - 1) * _STAGE + 1


def load_tae(path: pathlib.Path, device: torch.device | None = None, dtype: torch.dtype | None = None) -> VideoDecoder:
    """A TAEHV's decoder, its sizes as the file's shapes have them.

    Args:
        path: ``.safetensors``, or ``.pth`` in zip format, of which nothing is executed.
        device: where it runs; the CPU by default.
        dtype: of its weights; the file's by default.

    Raises:
        CheckpointError: when the file cannot be read or holds something else.
    """
    tensors = {n.removeprefix(_PREFIX): t for n, t in read_raw(path).items() if n.startswith(_PREFIX)}
    model = _sized(tensors, path)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [n for n, shape in expected.items() if n in tensors and tensors[n].shape != shape]
    missing, extra = [n for n in expected if n not in tensors], [n for n in tensors if n not in expected]
    problems = {"missing": missing, "unexpected": extra, "of another shape": wrong}
    if listed := "; ".join(f"{what}: {compact(names)}" for what, names in problems.items() if names):
        raise CheckpointError(f"{path} does not hold the decoder of a TAEHV for Wan. {listed}")
    model.load_state_dict(tensors, assign=True)
    chosen = dtype or tensors["1.weight"].dtype
    return TaeDecoder(model.eval().requires_grad_(False).to(device or torch.device("cpu"), chosen))


def _sized(tensors: Mapping[str, Tensor], path: pathlib.Path) -> nn.Sequential:
    """A decoder without memory of the sizes that the shapes show."""
    grows = [f"{i}.conv.weight" for i in _GROWS]
    needed = ("1.weight", *grows, f"{_LAST}.weight")
    if absent := [name for name in needed if name not in tensors or tensors[name].ndim != 4]:
        raise CheckpointError(
            f"{path} is no TAEHV decoder: {', '.join(_PREFIX + name for name in absent)} is not in it. Expected "
            "taew2_1.pth or the same as safetensors; Wan's own VAE is read from a folder of diffusers"
        )
    factors = [tensors[name].shape[0] // max(1, tensors[name].shape[1]) for name in grows]
    widths = tuple(tensors[name].shape[1] for name in (*grows, f"{_LAST}.weight"))
    if any(factor not in (1, 2) for factor in factors):
        raise CheckpointError(f"{path}: its stages make {factors} frames of one, expected 1 or 2")
    with torch.device("meta"):
        return _decoder(tensors["1.weight"].shape[1], tuple(factors), tensors[f"{_LAST}.weight"].shape[0], widths)


class TaeDecoder(VideoDecoder):
    """A decoder of this kind; it takes latents as the denoiser makes them, with no mean or deviation of their own."""

    def __init__(self, model: nn.Sequential) -> None:
        self.model = model
        first, last = model[1], model[-1]
        assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
        self.channels, self.patch = first.in_channels, round((last.out_channels / 3) ** 0.5)
        factors = [layer.factor for layer in model if isinstance(layer, _MoreFrames)]
        self.late = int(torch.tensor(factors).prod()) - 1
        """Frames at the beginning of a video that stand for nothing, as Wan's first latent is of one frame."""

    def begin(self) -> VideoStream:
        """A stream whose first latent gives one frame; every other gives four."""
        return _TaeStream(self, {}, self.late)


@dataclasses.dataclass
class _TaeStream(VideoStream):
    """``before`` is the last frame that each remembering block has seen, ``drop`` the frames yet to be left out."""

    decoder: TaeDecoder
    before: dict[int, Tensor]
    drop: int

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        first = self.decoder.model[1]
        assert isinstance(first, nn.Conv2d)
        batch = latents.shape[0]
        x = latents.flatten(0, 1).to(first.weight.device, first.weight.dtype)
        for i, layer in enumerate(self.decoder.model):
            if not isinstance(layer, _Remembering):
                x = layer(x)
                continue
            video = x.unflatten(0, (batch, -1))
            start = self.before.get(i, torch.zeros_like(video[:, :1]))
            self.before[i] = video[:, -1:].clone()
            x = layer(x, torch.cat((start, video[:, :-1]), dim=1).flatten(0, 1))
        frames = F.pixel_shuffle(x, self.decoder.patch).unflatten(0, (batch, -1))
        dropped = min(self.drop, frames.shape[1])
        self.drop -= dropped
        return (frames[:, dropped:].float().clamp(0, 1) * 2 - 1).cpu()

    def fork(self) -> VideoStream:
        return dataclasses.replace(self, before=dict(self.before))
