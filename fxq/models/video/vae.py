"""Wan's VAE of diffusers from a local folder: latents to frames, chunk by chunk, on its own cache of features."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxq.models.checkpoints import CheckpointError, compact, read_raw
from fxq.models.diffusers_folder import INDEX, load_folder
from fxq.models.video.decoding import VideoDecoder, VideoStream
from fxq.models.video.taehv import load_tae
from fxq.shadowed import answer_transformers

_CLASS = "AutoencoderKLWan"
_SIZES = ("encoder.conv1.weight", "decoder.conv1.weight", "conv2.weight")
"""Of the original form: tensors that show its width, that of its deepest level, and the channels of its latents."""
_ORIGINAL = frozenset(_SIZES)
_DEEPEST = 4
"""Width of the deepest level over that of the first, in every VAE of Wan."""


def load_decoder(
    path: str | pathlib.Path, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> VideoDecoder:
    """A decoder of Wan's latents, in eval mode.

    Args:
        path: a folder of an ``AutoencoderKLWan`` or of a pipeline with one (``vae/``), as ``save_pretrained`` wrote
            it; or a file, ``.safetensors`` or ``.pth`` of plain tensors: Wan 2.1's VAE in its original form
            (``Wan2.1_VAE.pth``), also with fewer channels (LightVAE), or a TAEHV for Wan (``taew2_1.pth``), which is
            fast and not exact.
        device: where it runs; the CPU by default.
        dtype: of its weights; the file's by default, which for Wan is float32.

    Raises:
        CheckpointError: nothing there, diffusers is not installed, another class, or tensors that do not fit.
    """
    root = pathlib.Path(path)
    if root.is_file():
        tensors = read_raw(root)
        if tensors.keys() >= _ORIGINAL:
            return WanDecoder(_from_original(tensors, root, dtype).to(device or torch.device("cpu")))
        return load_tae(root, device, dtype)
    vae: Any = load_folder(root, dtype, "vae" if (root / INDEX).is_file() else None)
    if type(vae).__name__ != _CLASS:
        raise CheckpointError(f"{root} holds a {type(vae).__name__}, expected the {_CLASS} that Wan's latents are of")
    return WanDecoder(vae.to(device or torch.device("cpu")))


def _from_original(tensors: Mapping[str, Tensor], path: pathlib.Path, dtype: torch.dtype | None) -> Any:
    """The VAE of a file with Wan's own names, its sizes as the shapes show them; diffusers has the names' table."""
    answer_transformers()
    try:
        from diffusers import AutoencoderKLWan
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    except ImportError as error:
        raise CheckpointError(f"{path} needs diffusers ({error}): pip install 'fxq[wan]'") from None
    state = convert_wan_vae_to_diffusers(dict(tensors))
    width, deep, latents = (tensors[name].shape[0] for name in _SIZES)
    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=width, decoder_base_dim=deep // _DEEPEST, z_dim=latents)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [name for name, shape in expected.items() if name not in state or state[name].shape != shape]
    if wrong or len(state) != len(expected):
        extra = [name for name in state if name not in expected]
        raise CheckpointError(
            f"{path} is no VAE of Wan 2.1. Missing or of another shape: {compact(wrong) or 'none'}; unexpected: "
            f"{compact(extra) or 'none'}. Others are read from a folder of diffusers"
        )
    chosen = dtype or state["decoder.conv_in.weight"].dtype
    model.load_state_dict({name: tensor.to(chosen) for name, tensor in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


class WanDecoder(VideoDecoder):
    """An ``AutoencoderKLWan`` of diffusers.

    Raises:
        CheckpointError: when its mean and deviation are not those of its latents.
    """

    def __init__(self, vae: Any) -> None:
        self.vae, config = vae, vae.config
        self.channels = int(config.z_dim)
        if not len(config.latents_mean) == len(config.latents_std) == self.channels:
            raise CheckpointError(
                f"the VAE has {self.channels} channels of latents, and latents_mean of {len(config.latents_mean)} and "
                f"latents_std of {len(config.latents_std)} numbers in its config.json: expected as many"
            )
        weight = next(vae.decoder.parameters())
        self._shape = (1, self.channels, 1, 1, 1)
        self.mean = torch.tensor(config.latents_mean, dtype=weight.dtype, device=weight.device).view(self._shape)
        self.deviation = torch.tensor(config.latents_std, dtype=weight.dtype, device=weight.device).view(self._shape)

    def begin(self) -> VideoStream:
        """A stream whose first latent gives one frame; every other gives ``scale_factor_temporal``."""
        return _WanStream(self, [None] * _convolutions(self.vae))


def _convolutions(vae: Any) -> int:
    """How many features the decoder keeps: one of each of its causal convolutions."""
    vae.clear_cache()
    return len(vae._feat_map)


@dataclasses.dataclass
class _WanStream(VideoStream):
    """``features`` are the decoder's own, replaced by it call by call and never written into."""

    decoder: WanDecoder
    features: list[Tensor | str | None]
    first: bool = True

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        owner, vae = self.decoder, self.decoder.vae
        scaled = latents.transpose(1, 2).to(owner.mean.device, owner.mean.dtype) * owner.deviation + owner.mean
        frames = []
        for latent in vae.post_quant_conv(scaled).split(1, dim=2):
            # One latent frame a call, as AutoencoderKLWan.decode has it: its cache is defined by that.
            made = vae.decoder(latent, feat_cache=self.features, feat_idx=[0], first_chunk=self.first)
            self.first = False
            frames.append(_unpatched(made, vae.config.patch_size).clamp(-1, 1).float().cpu())
        return torch.cat(frames, dim=2).transpose(1, 2)

    def fork(self) -> VideoStream:
        return dataclasses.replace(self, features=list(self.features))


def _unpatched(frames: Tensor, patch: int | None) -> Tensor:
    """Pixels of frames [B, 3 * patch * patch, T, H, W] whose channels hold patches, as those of Wan 2.2's VAE do."""
    if patch is None or patch == 1:
        return frames
    batch, channels, count, rows, columns = frames.shape
    split = frames.view(batch, channels // patch**2, patch, patch, count, rows, columns)
    # Of a patch's pixels the columns run slower.
    return split.permute(0, 1, 4, 5, 3, 6, 2).reshape(batch, -1, count, rows * patch, columns * patch)
