import pytest
import torch
from safetensors.torch import load_file

from fxq.export.interop import InteropError, Options, export_bundle
from fxq.export.interop.layers import read_model
from fxq.export.interop.names import DIFFUSERS
from tests.export.interop_toys import agreement, int8_product, make_bundle, original_weights, read_json
from tests.toys import rows

LINEARS = ("attn1.to_qkv", "attn1.to_out", *(f"attn2.to_{part}" for part in ("q", "k", "v", "out")))
LINEARS = (*LINEARS, "ffn.net_0.proj", "ffn.net_2")
FILES = {".to_out": ".to_out.0", ".net_0": ".net.0", ".net_2": ".net.2"}


class Reader:
    """What vLLM-Omni 0.30.0 loads from the folder, written from its sources.

    ``DiffusionInt8Config`` takes the keys of ``quantization_config`` but ``quant_method``; without
    ``is_checkpoint_int8_serialized`` integers are taken for float weights. Linears of the blocks
    (``wan2_2_transformer``) are int8 unless their own name is in ``ignored_layers``; of the fused ``to_qkv`` its three
    parts have to be, or none. All others are plain linears. ``load_weights`` renames ``net.0``, ``net.2`` and
    ``to_out.0``, copies in the parameter's dtype and skips what the model has no parameter for.
    """

    def __init__(self, folder):
        config = read_json(folder / "config.json")["quantization_config"]
        assert config.pop("quant_method") == "int8"
        assert set(config) == {"is_checkpoint_int8_serialized", "activation_scheme", "ignored_layers"}
        assert config["is_checkpoint_int8_serialized"] is True and config["activation_scheme"] == "dynamic"
        self.ignored = config["ignored_layers"]
        self.tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        self.used = set()

    def skipped(self, prefix):
        if prefix.endswith(".to_qkv"):
            parts = [prefix.replace("to_qkv", f"to_{part}") in self.ignored for part in "qkv"]
            assert len(set(parts)) == 1, "ValueError: some but not all shards"
            return parts[0]
        return prefix in self.ignored

    def take(self, name, kind):
        self.used.add(name)
        assert (self.tensors[name].dtype == torch.int8) == (kind == "int8"), f"{name} is copied as {kind}"
        return self.tensors[name]

    def linear(self, prefix, x):
        """A linear by the runtime's name; of ``to_qkv`` q, k and v side by side."""
        names = [prefix.replace("to_qkv", f"to_{part}") for part in "qkv"] if prefix.endswith("to_qkv") else [prefix]
        for old, new in FILES.items():
            names = [name.replace(old, new) for name in names]
        bias = torch.cat([self.take(f"{name}.bias", "float") for name in names])
        if not prefix.startswith("blocks.") or self.skipped(prefix):
            weight = torch.cat([self.take(f"{name}.weight", "float") for name in names])
            return torch.nn.functional.linear(x, weight, bias)
        integers = torch.cat([self.take(f"{name}.weight", "int8") for name in names])
        scale = torch.cat([self.take(f"{name}.weight_scale", "float") for name in names])
        assert scale.shape == (len(integers), 1)
        return int8_product(x, integers, scale, bias)


def check(bundle, folder):
    """dB of every quantized layer of the bundle as the reader computes it."""
    model, reader, found = read_model(bundle), Reader(folder), {}
    stored = {model.naming.rename(layer, DIFFUSERS): entry for layer, entry in model.layers.items()}
    for prefix in [*(f"blocks.0.{name}" for name in LINEARS), *(n for n in stored if n.startswith("condition_"))]:
        parts = [prefix.replace("to_qkv", f"to_{part}") for part in "qkv"] if "to_qkv" in prefix else [prefix]
        for old, new in FILES.items():
            parts = [part.replace(old, new) for part in parts]
        layers = [stored[part] for part in parts if part in stored]
        x = rows(20, reader.tensors[f"{parts[0]}.weight"].shape[1])
        pieces = reader.linear(prefix, x).tensor_split(len(parts), dim=1)
        found |= {(layer.plan.layer): agreement(layer, got, x) for layer, got in zip(layers, pieces, strict=False)}
    left = {n for n in reader.tensors if n.endswith("weight_scale")} - reader.used
    assert not left, f"Skipping weight {left}"
    return found


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ((), []),
        (("*ffn.0", "*ffn.2", "*attn.o"), ["attn1.to_out", "attn2.to_out", "ffn.net_0.proj", "ffn.net_2"]),
        (("*self_attn.q", "*self_attn.k", "*self_attn.v"), ["attn1.to_k", "attn1.to_q", "attn1.to_qkv", "attn1.to_v"]),
    ],
)
def test_its_own_rules_load_the_layers_that_are_int8_and_no_others(keep, kept, tmp_path):
    bundle = make_bundle(tmp_path / "b", 8, keep)
    report = export_bundle(bundle, "vllm-omni", tmp_path / "out")
    found = check(bundle, tmp_path / "out")
    assert len(found) == 12 - len([name for name in kept if "to_qkv" not in name]) and min(found.values()) > 30
    ignored = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignored_layers"]
    assert sorted(name.removeprefix("blocks.0.") for name in ignored if name.startswith("blocks")) == kept
    assert any("no loop for causal Wan" in note for note in report.notes)


def test_the_text_embedder_is_written_in_floating_point(tmp_path):
    bundle, original = make_bundle(tmp_path / "b", 8), original_weights()
    name = "condition_embedder.text_embedder.linear_1.weight"
    for given, weight in (
        (None, read_model(bundle).layers["text_embedding.0"].weight()),
        (original, original["text_embedding.0.weight"]),
    ):
        export_bundle(bundle, "vllm-omni", tmp_path / "out", Options(original=given))
        tensors = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
        assert torch.equal(tensors[name], weight) and f"{name}_scale" not in tensors


def test_a_part_of_q_k_and_v_is_refused_with_the_way_out(tmp_path):
    bundle = make_bundle(tmp_path / "b", 8, ("*self_attn.k",))
    message = r"q, k and v .* in 1 \(blocks.0.attn1: k\): keep all three by a rule, or quantize all three"
    with pytest.raises(InteropError, match=message):
        export_bundle(bundle, "vllm-omni", tmp_path / "out")
    assert not (tmp_path / "out").exists()
