import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fxq.export.interop import Options, export_bundle
from fxq.export.interop.layers import read_model
from tests.export.interop_toys import agreement, int8_product, make_bundle, read_json
from tests.toys import rows

LINEARS = [f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"] + ["ffn.0", "ffn.2"]


class Reader:
    """What LightX2V f8aee98 loads, written from its sources (``WanModel``, ``WanSFModel``, ``MMWeightWint8...``).

    All tensors of the file that ``dit_quantized_ckpt`` names are read; the runner ``wan2.1_sf`` then cuts six
    characters off every key, whatever they are. With ``lazy_load`` that is ``non_block.safetensors`` of a folder, and
    a block's tensors are taken by their names without prefix from ``block_N.safetensors``. Every linear of a block has
    int8 ``weight`` [N, K], ``weight_scale`` [N, 1] and ``bias``; the buffers of offloading index all three.
    """

    def __init__(self, folder, causal):
        config = read_json(folder / "lightx2v.json")
        assert config["dit_quantized"] is True and config["dit_quant_scheme"] == "int8-vllm"
        self.lazy = config.get("lazy_load", False)
        self.folder = folder / config["dit_quantized_ckpt"]
        tensors = load_file(self.folder / "non_block.safetensors" if self.lazy else self.folder)
        self.tensors = {name[6:] if causal else name: tensor for name, tensor in tensors.items()}

    def get(self, name):
        if self.lazy and name.startswith("blocks."):
            with safe_open(self.folder / f"block_{name.split('.')[1]}.safetensors", "pt") as file:
                return file.get_tensor(name)
        return self.tensors[name]

    def linear(self, name, x):
        weight, scale, bias = (self.get(f"{name}.{leaf}") for leaf in ("weight", "weight_scale", "bias"))
        assert weight.dtype == torch.int8 and scale.shape == (len(weight), 1)
        return int8_product(x, weight, scale.to(torch.bfloat16), bias)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("b") / "wan", 8)


@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("causal", [None, False])
def test_its_own_rules_load_every_linear_of_a_block(bundle, causal, per_block, tmp_path):
    report = export_bundle(bundle, "lightx2v", tmp_path / "out", Options(causal=causal, per_block=per_block))
    reader, model = Reader(tmp_path / "out", causal is None), read_model(bundle)
    for name in LINEARS:
        stored = model.layers[f"blocks.0.{name}"]
        x = rows(20, stored.plan.in_features)
        assert agreement(stored, reader.linear(f"blocks.0.{name}", x), x) > 30
    for name in ("patch_embedding.weight", "text_embedding.0.weight", "head.head.bias", "time_projection.1.weight"):
        assert reader.get(name).dtype == torch.float32
    assert reader.get("blocks.0.modulation").shape == (1, 6, 64)
    files = ("block_0.safetensors", "non_block.safetensors") if per_block else ("model.safetensors",)
    assert set(report.files) == {*files, "lightx2v.json"}
    assert any("write the full path" in note for note in report.notes)


def test_a_bias_of_zeros_is_written(tmp_path, monkeypatch):
    from tests.export import interop_toys

    rollout = interop_toys.wan_rollout(seeds=(1,), frames=2)
    rollout.denoiser.blocks[0].ffn[0].bias.zero_()
    monkeypatch.setattr(interop_toys, "wan_rollout", lambda **_: rollout)
    export_bundle(make_bundle(tmp_path / "b", 8), "lightx2v", tmp_path / "out")
    bias = load_file(tmp_path / "out" / "model.safetensors")["model.blocks.0.ffn.0.bias"]
    assert bias.shape == (96,) and not bias.any()
