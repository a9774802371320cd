import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxq.models.checkpoints import CheckpointError
from fxq.models.video.vae import WanDecoder, load_decoder
from tests import wan

pytest.importorskip("diffusers")

WAN_22 = {
    "decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_spatial": 16, "latents_mean": [0.1] * 48, "latents_std": [1.5] * 48,
}  # fmt: skip


def in_one_piece(vae, latents):
    """As WanPipeline has it, [B, F, C, H, W] to [B, T, 3, rows, columns]."""
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return vae.decode(latents.transpose(1, 2) / (1 / deviation) + mean, return_dict=False)[0].transpose(1, 2)


@pytest.mark.parametrize("options", [{}, WAN_22], ids=["wan2.1", "wan2.2"])
@pytest.mark.parametrize("sizes", [(3, 3, 3), (1, 5, 3)])
def test_a_streamed_decode_is_the_decode_in_one_piece(options, sizes):
    vae = wan.vae(**options)
    latents = torch.randn(2, sum(sizes), vae.config.z_dim, 4, 6)
    stream = WanDecoder(vae).begin()
    parts = [stream.decode(part) for part in latents.split(list(sizes), dim=1)]
    assert [part.shape[1] for part in parts] == [4 * sizes[0] - 3, *(4 * size for size in sizes[1:])]
    want = in_one_piece(vae, latents)
    assert want.std() > 0.02 and (want.abs() < 1).float().mean() > 0.5
    assert torch.allclose(torch.cat(parts, 1), want, atol=2e-5)


def test_a_fork_goes_on_alone_and_two_streams_do_not_mix():
    decoder = WanDecoder(wan.vae())
    first, second = torch.randn(2, 1, 6, wan.CHANNELS, 4, 6)
    a, b = decoder.begin(), decoder.begin()
    starts = a.decode(first[:, :3]), b.decode(second[:, :3])
    fork = a.fork()
    other = fork.decode(second[:, 3:])
    ends = a.decode(first[:, 3:]), b.decode(second[:, 3:])
    for latents, start, end in zip((first, second), starts, ends, strict=True):
        assert torch.allclose(torch.cat((start, end), 1), in_one_piece(decoder.vae, latents), atol=2e-5)
    mixed = torch.cat((first[:, :3], second[:, 3:]), 1)
    assert torch.allclose(torch.cat((starts[0], other), 1), in_one_piece(decoder.vae, mixed), atol=2e-5)
    assert not torch.allclose(other, ends[1], atol=1e-3), "history matters"


def test_it_is_read_from_its_own_folder_and_from_a_pipelines(tmp_path):
    vae = wan.vae()
    vae.save_pretrained(tmp_path / "pipe" / "vae")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    latents = torch.randn(1, 2, wan.CHANNELS, 4, 6)
    for folder in (tmp_path / "pipe", tmp_path / "pipe" / "vae"):
        decoder = load_decoder(folder)
        assert decoder.channels == wan.CHANNELS
        assert torch.allclose(decoder.begin().decode(latents), in_one_piece(vae, latents), atol=2e-5)
    half = load_decoder(tmp_path / "pipe", dtype=torch.bfloat16).begin().decode(latents)
    assert half.dtype == torch.float32 and (half - in_one_piece(vae, latents)).abs().mean() < 0.05


def test_what_is_no_vae_of_wan_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="is no folder"):
        load_decoder(tmp_path / "nowhere")
    wan.transformer().save_pretrained(tmp_path / "dit")
    with pytest.raises(CheckpointError, match="holds a WanTransformer3DModel, expected the AutoencoderKLWan"):
        load_decoder(tmp_path / "dit")
    vae = wan.vae()
    vae.save_pretrained(tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    right = json.loads(config.read_text())
    config.write_text(json.dumps(right | {"latents_std": [1.0] * 3}))
    with pytest.raises(CheckpointError, match=r"latents_mean of 16 and latents_std of 3 numbers in its config\.json"):
        load_decoder(tmp_path / "vae")
    config.write_text(json.dumps(right))
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"missing: decoder\.conv_out\.weight"):
        load_decoder(tmp_path / "vae")


def original_names(vae):
    """Wan's own name of each tensor, by trying all that its VAE can have on diffusers' table."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    ends = [
        f"{part}.{kind}"
        for part in ("residual.2", "residual.6", "shortcut", "resample.1", "time_conv")
        for kind in ("weight", "bias")
    ]
    ends += ["residual.0.gamma", "residual.3.gamma"]
    layers = [f"{side}.{i}" for side in ("encoder.downsamples", "decoder.upsamples") for i in range(16)]
    names = [f"{layer}.{end}" for layer in layers for end in ends]
    for side in ("encoder", "decoder"):
        names += [f"{side}.middle.{i}.{end}" for i in (0, 2) for end in ends]
        names += [
            f"{side}.middle.1.{end}"
            for end in ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias")
        ]
        names += [
            f"{side}.{end}" for end in ("conv1.weight", "conv1.bias", "head.0.gamma", "head.2.weight", "head.2.bias")
        ]
    names += [f"{conv}.{kind}" for conv in ("conv1", "conv2") for kind in ("weight", "bias")]
    found = {}
    for name in names:
        (converted,) = convert_wan_vae_to_diffusers({name: name})
        if converted in vae.state_dict():
            assert converted not in found, f"{name} and {found.get(converted)}"
            found[converted] = name
    assert found.keys() == vae.state_dict().keys()
    return found


@pytest.mark.parametrize("base_dim", [8, 4])
def test_the_original_form_is_read_with_any_number_of_channels(base_dim, tmp_path):
    vae = wan.vae(base_dim=base_dim, num_res_blocks=2)
    tensors = {name: vae.state_dict()[converted].clone() for converted, name in original_names(vae).items()}
    torch.save(tensors, tmp_path / "Wan2.1_VAE.pth")
    latents = torch.randn(1, 4, wan.CHANNELS, 4, 6)
    decoder = load_decoder(tmp_path / "Wan2.1_VAE.pth")
    assert torch.allclose(decoder.begin().decode(latents), in_one_piece(vae, latents), atol=2e-5)
    half = load_decoder(tmp_path / "Wan2.1_VAE.pth", dtype=torch.bfloat16)
    assert {p.dtype for p in half.vae.parameters()} == {torch.bfloat16}
    del tensors["decoder.head.2.bias"]
    tensors["decoder.middle.0.residual.2.bias"] = torch.ones(1)
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"no VAE of Wan 2\.1.*resnets\.0\.conv1\.bias, decoder\.conv_out\.bias"):
        load_decoder(tmp_path / "vae.safetensors")
