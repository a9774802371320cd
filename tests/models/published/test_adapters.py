"""Each family as a small file of its own layout: it loads and holds what its module computes with."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxq.models.causal_wan import CausalWan, CausalWanConfig, rope_tables
from fxq.models.checkpoints import CheckpointError
from fxq.models.families import FAMILIES, Family, read_settings, with_settings
from fxq.models.loading import load_causal_wan, seen_sizes
from fxq.models.published.adapters import adapted, own_layer
from fxq.models.published.names import DIFFUSERS, ORIGINAL, Naming

SIZES = {"ffn_dim": 40, "num_layers": 2, "freq_dim": 16, "text_dim": 20}
CONFIG = CausalWanConfig(dim=24, num_heads=2, text_len=5, in_dim=4, out_dim=4, **SIZES)
FAMILY = Family(name="small", source="a test", config=CONFIG)


def weights(config=CONFIG):
    torch.manual_seed(0)
    return CausalWan(config).state_dict()


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_loads(path, family=FAMILY, want=None, **options):
    got = load_causal_wan(path, family, **options).state_dict()
    want = weights(family.config) if want is None else want
    assert got.keys() == want.keys() and all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_repacks_of_comfyui(prefix, tmp_path):
    save_file(prefixed(weights(), prefix), tmp_path / "a.safetensors")
    assert_loads(tmp_path / "a.safetensors")


@pytest.mark.parametrize("key", ["state_dict", "module", "ema"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_containers_of_trainers(key, prefix, tmp_path):
    torch.save({key: prefixed(weights(), prefix), "step": 3}, tmp_path / "a.pt")
    assert_loads(tmp_path / "a.pt")


def test_an_averaged_model_comes_before_the_one_that_is_trained(tmp_path):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights().items()}
    torch.save({"model": zeros, "state_dict": zeros, "ema": weights()}, tmp_path / "a.pt")
    assert_loads(tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_casts_to_float8_without_scales_are_bfloat16(dtype, suffix, tmp_path):
    state = {n: t.to(dtype) if t.ndim == 2 else t.bfloat16() for n, t in weights().items()}
    path = tmp_path / f"a{suffix}"
    (torch.save if suffix == ".pt" else save_file)(state, path)
    assert_loads(path, want={name: tensor.to(torch.bfloat16) for name, tensor in state.items()})
    assert load_causal_wan(path, FAMILY, dtype=torch.float32).head.head.weight.dtype == torch.float32


DIFFUSERS_CONFIG = {
    "_class_name": "CausalWanTransformer3DModel",
    "_diffusers_version": "0.33.0",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": None,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
    "local_attn_size": 6,
    "sink_size": 1,
    "num_frames_per_block": 3,
    "sliding_window_num_frames": 21,
    "text_len": 5,
    **SIZES,
}


@pytest.mark.parametrize("prefix", ["", "model._fsdp_wrapped_module."])
def test_causal_wan_by_the_names_of_diffusers(prefix, tmp_path):
    naming, state = Naming(ORIGINAL), weights()
    save_file({prefix + naming.rename(n, DIFFUSERS): t for n, t in state.items()}, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS_CONFIG))
    family = with_settings(FAMILIES["causal-wan"], read_settings(tmp_path))
    assert family.config == CONFIG and family.sampler.frames_per_chunk == 3
    assert (family.sampler.cache.window, family.sampler.cache.sink) == (6, 1)
    assert_loads(tmp_path / "a.safetensors", family)
    assert seen_sizes(tmp_path / "a.safetensors")["dim"] == 24


def test_a_layer_that_a_family_adds_is_listed(tmp_path):
    state = {Naming(ORIGINAL).rename(n, DIFFUSERS): t for n, t in weights().items()}
    save_file(state | {"blocks.0.attn1.camera.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected.*blocks.\[0\].*camera.weight"):
        load_causal_wan(tmp_path / "a.safetensors", FAMILY)


class Sky(CausalWan):
    """SkyReels-V2 DF: the embedding of the frame rate is added to the modulation of the blocks."""

    def __init__(self, config):
        super().__init__(config)
        self.fps_embedding = nn.Embedding(2, config.dim)
        self.fps_projection = nn.Sequential(
            nn.Linear(config.dim, config.dim), nn.SiLU(), nn.Linear(config.dim, 6 * config.dim)
        )

    def embed_time(self, t):
        e, e0 = super().embed_time(t)
        return e, e0 + self.fps_projection(self.fps_embedding(torch.tensor(1))).unflatten(0, (6, -1))


@torch.no_grad()
def test_skyreels_diffusion_forcing_computes_the_same(tmp_path):
    torch.manual_seed(0)
    source = Sky(CONFIG).eval()
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    official = {"model_type": "t2v", "inject_sample_info": True, "dim": 24, "num_heads": 2, "in_dim": 4, "out_dim": 4}
    family = with_settings(FAMILIES["causal-wan"], official | SIZES | {"text_len": 5})
    model = load_causal_wan(tmp_path / "a.safetensors", family)
    cos, sin = rope_tables(12, 1, 2, 3)
    empty = [torch.zeros(1, 0, 2, 12)] * 2
    args = (torch.randn(1, 1, 4, 4, 6), torch.full((1, 1), 700.0), torch.randn(1, 5, 20), *[empty] * 4, cos, sin)
    want, got = source(*args)[0], model(*args)[0]
    plain = CausalWan(CONFIG).eval()
    plain.load_state_dict(source.state_dict(), strict=False)
    assert torch.allclose(got, want, atol=1e-5) and not torch.allclose(plain(*args)[0], want, atol=1e-3)
    assert adapted(plain.state_dict()).keys() == plain.state_dict().keys()


def test_wan_of_48_channels_says_ti2v(tmp_path):
    config = CausalWanConfig(dim=24, num_heads=2, text_len=5, in_dim=48, out_dim=48, **SIZES)
    torch.save({"generator": prefixed(weights(config), "model.")}, tmp_path / "a.pt")
    settings = {"_class_name": "WanModel", "model_type": "ti2v", "dim": 24, "num_heads": 2, "text_len": 5}
    (tmp_path / "config.json").write_text(json.dumps(settings | SIZES | {"in_dim": 48, "out_dim": 48}))
    family = with_settings(FAMILIES["causal-wan"], read_settings(tmp_path) | {"num_frame_per_block": 8})
    assert family.config == config and family.sampler.frames_per_chunk == 8
    assert_loads(tmp_path / "a.pt", family)


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model.transformer."])
def test_a_lora_by_the_names_of_diffusers_is_merged_as_one_by_wans_own(prefix, tmp_path):
    layers = {"blocks.1.ffn.0": (24, 40), "blocks.0.cross_attn.o": (24, 24), "text_embedding.2": (24, 24)}
    pairs = {n: {"lora_A": torch.randn(3, k), "lora_B": torch.randn(m, 3)} for n, (k, m) in layers.items()}
    save_file(weights(), tmp_path / "a.safetensors")
    naming = Naming(ORIGINAL)
    for file, name in (("own", lambda n: n), ("theirs", lambda n: prefix + naming.rename(n, DIFFUSERS))):
        lora = {f"{name(n)}.{half}.weight": t for n, pair in pairs.items() for half, t in pair.items()}
        save_file(lora, tmp_path / f"{file}.safetensors")
    own = load_causal_wan(tmp_path / "a.safetensors", FAMILY, lora=tmp_path / "own.safetensors").state_dict()
    assert_loads(tmp_path / "a.safetensors", want=own, lora=tmp_path / "theirs.safetensors")
    assert not torch.equal(own["blocks.1.ffn.0.weight"], weights()["blocks.1.ffn.0.weight"])
    assert own_layer("blocks.0.self_attn.q") == "blocks.0.self_attn.q"
