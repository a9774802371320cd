import json
import math

import pytest
import torch
from safetensors.torch import save_file

from fxq.models.checkpoints import CheckpointError, read_tensors
from fxq.models.lora import check_updates, read_lora

Q, K, FFN = "blocks.0.self_attn.q", "blocks.0.self_attn.k", "blocks.1.ffn.0"
RANK = 4


def tensors(layers=(Q, K, FFN), prefix="base_model.model.", ranks=None, **changes):
    torch.manual_seed(3)
    content = {}
    for layer in layers:
        rank = (ranks or {}).get(layer, RANK)
        content[f"{prefix}{layer}.lora_A.weight"] = torch.randn(rank, 9)
        content[f"{prefix}{layer}.lora_B.weight"] = torch.randn(7, rank)
    return content | changes


def written(folder, content, config=None, header=None):
    metadata = None if header is None else {"lora_adapter_metadata": json.dumps(header)}
    save_file(content, folder / "adapter.safetensors", metadata=metadata)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "adapter_config.json").write_text(text)
    return folder / "adapter.safetensors"


def scales(path, alpha=None):
    found = read_lora(path, alpha)
    return [found[layer].scale for layer in (Q, K, FFN)]


BASE = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", "use_dora": False, "modules_to_save": None}


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, [2, 2, 2]),
        ({"use_rslora": True}, [4, 4, 4]),
        ({"alpha_pattern": {"self_attn.q": 12}}, [3, 2, 2]),
        ({"alpha_pattern": {"q": 12, r"blocks\.\d+\.ffn\.0": 2.0}}, [3, 2, 0.5]),
        ({"alpha_pattern": {Q: 12, "self_attn.q": 40}}, [3, 2, 2]),
        ({"alpha_pattern": {"^blocks.0.self_attn.[qk]": 4}}, [1, 1, 2]),
        ({"alpha_pattern": {"self_attn.q|self_attn.k": 4}, "use_rslora": True}, [2, 2, 4]),
        ({"alpha_pattern": None, "rank_pattern": {}, "target_modules": ["q"], "lora_dropout": 0.1}, [2, 2, 2]),
    ],
    ids=str,
)
def test_scales_are_those_of_peft(tmp_path, settings, want):
    assert scales(written(tmp_path, tensors(), BASE | settings)) == want


@pytest.mark.parametrize("root", [False, True])
def test_a_layer_of_another_rank_has_its_own_scale(tmp_path, root):
    config = BASE | {"rank_pattern": {"self_attn.k": 16}, "use_rslora": root}
    path = written(tmp_path, tensors(ranks={K: 16}), config)
    assert scales(path) == ([4, 2, 4] if root else [2, 0.5, 2])


def test_settings_in_the_header_count_as_those_beside_the_file(tmp_path):
    header = {f"transformer.{k}": v for k, v in (BASE | {"use_rslora": True}).items()}
    assert scales(written(tmp_path, tensors(), header=header)) == [4, 4, 4]
    with pytest.raises(CheckpointError, match=r"lora_adapter_metadata: use_dora = 'True' is more than a low-rank"):
        read_lora(written(tmp_path, tensors(), header={**header, "transformer.use_dora": True}))


def test_an_alpha_given_or_in_the_file_takes_the_place_of_the_settings(tmp_path):
    config = BASE | {"alpha_pattern": {"q": 12}}
    own = {f"base_model.model.{K}.alpha": torch.tensor(20.0)}
    assert scales(written(tmp_path, tensors(**own), config)) == [3, 5, 2]
    assert scales(tmp_path / "adapter.safetensors", alpha=1.0) == [0.25] * 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(BASE | {"use_rslora": True}))
    with pytest.raises(CheckpointError, match=r"alphas of its own, .* has use_rslora: .* give the alpha"):
        read_lora(tmp_path / "adapter.safetensors")
    assert scales(tmp_path / "adapter.safetensors", alpha=1.0) == [0.5] * 3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora = 'True' is more than a low-rank update; merge the LoRA with the tool"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"modules_to_save": ["head"]}, r"modules_to_save = \"\['head'\]\""),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights = 'pissa_niter_16'"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"use_a_new_thing": True}, "use_a_new_thing"),
        ({"lora_alpha": "16"}, "no number lora_alpha but '16'"),
        ({"lora_alpha": True}, "no number lora_alpha but True"),
        ({"lora_alpha": None}, "no number lora_alpha but None; give the alpha yourself"),
        ({"lora_alpha": 10**400}, "has more than 64 bits"),
        ({"alpha_pattern": {"q": "8"}}, "no number alpha_pattern 'q' but '8'"),
        ({"alpha_pattern": ["q"]}, r"alpha_pattern is \['q'\], expected a table"),
        ({"alpha_pattern": {"self_attn.v": 3}}, r"alpha_pattern 'self_attn\.v' matches no layer"),
        ({"rank_pattern": {"self_attn.k": 8}}, "self_attn.k has rank 4 in the file and 8 by the settings"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern 'q' is 0, expected a rank"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern '\(' is no regular expression"),
        ({"alpha_pattern": {"(a*)*b": 4}}, "too involved to match safely"),
        ({"alpha_pattern": {".*.*.*.*x": 4}}, "too involved to match safely"),
        ({"r": 5}, "has rank 4 in the file and 5 by the settings"),
        ({"r": "4"}, "r is '4', expected a rank"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
    ],
    ids=str,
)
def test_settings_that_are_more_than_a_scale_or_of_wrong_type_are_refused_by_name(tmp_path, settings, reason):
    path = written(tmp_path, tensors(), BASE | settings)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_lora(path)
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000], ids=["empty", "list", "number", "open", "deep"])
def test_settings_that_are_no_table_are_refused(tmp_path, text):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json (is not valid JSON|holds a)"):
        read_lora(written(tmp_path, tensors(), text))


def poisoned(value):
    content = tensors()
    content[f"base_model.model.{K}.lora_B.weight"][3, 1] = value
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (poisoned(math.nan), rf"up of {K} has NaN or infinity"),
        (poisoned(-math.inf), rf"up of {K} has NaN or infinity"),
        (
            tensors() | {f"base_model.model.{K}.lora_A.weight": torch.ones(4, 9, dtype=torch.int32)},
            rf"down of {K} has torch.int32 numbers",
        ),
        (tensors() | {f"base_model.model.{K}.lora_magnitude_vector": torch.ones(7)}, "1 other tensors: .*magnitude"),
        (tensors() | {f"base_model.model.{K}.lora_B.bias": torch.ones(7)}, r"1 other tensors: .*lora_B\.bias"),
        (tensors() | {f"{K}.diff": torch.ones(7, 9)}, r"1 other tensors: .*diff"),
        (tensors() | {"base_model.model.head.weight": torch.ones(7, 9)}, "1 other tensors: .*head"),
        (tensors() | {"blocks.7.ffn.0.alpha": torch.tensor(1.0)}, r"1 other tensors: blocks.\[7\]\.ffn\.0\.alpha"),
        (tensors() | {f"{K}.alpha": torch.ones(2)}, rf"{K}\.alpha is \[2\], expected one finite number"),
        (tensors() | {f"{K}.alpha": torch.tensor(math.nan)}, rf"{K}\.alpha is \[\], expected one finite number"),
        (tensors() | {f"{K}.lora_down.weight": torch.ones(4, 9)}, f"two tensors are down of {K}"),
        (
            tensors() | {f"base_model.model.model.{K}.lora_A.weight": torch.ones(4, 9)},
            f"two tensors are down of {K}",
        ),
        (tensors() | {f"base_model.model.{K}.lora_A.weight": torch.ones(4, 9, 1, 1)}, r"expected \[rank, K\]"),
        (tensors(ranks={K: 0}), r"expected \[rank, K\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_more_or_less_than_finite_pairs_is_refused(tmp_path, content, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_lora(written(tmp_path, content))


def test_an_update_of_a_layer_that_is_absent_or_of_another_shape_is_refused(tmp_path):
    path = written(tmp_path, tensors())
    model = {f"{layer}.weight": torch.ones(7, 9) for layer in (Q, K, FFN)}
    check_updates(model, read_lora(path), path)
    with pytest.raises(CheckpointError, match=r"layers that the model does not have: blocks\.\[1\]\.ffn"):
        check_updates({n: t for n, t in model.items() if FFN not in n}, read_lora(path), path)
    with pytest.raises(CheckpointError, match=r"as \[7, 9\], the model's weight is \[7, 8\]"):
        check_updates(model | {f"{K}.weight": torch.ones(7, 8)}, read_lora(path), path)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "module.",
        "diffusion_model.",
        "model.diffusion_model.",
        "_orig_mod.",
        "base_model.model.generator.",
    ],
)
def test_names_lose_what_wrappers_put_in_front(tmp_path, prefix):
    assert set(read_lora(written(tmp_path, tensors(prefix=prefix)))) == {Q, K, FFN}
    save_file({f"{prefix}{Q}.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    want = Q if "base_model" not in prefix else f"{prefix}{Q}"
    assert list(read_tensors(tmp_path / "model.safetensors")) == [f"{want}.weight"]


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_an_alpha_that_is_not_finite_is_refused(tmp_path, alpha):
    with pytest.raises(CheckpointError, match="expected a finite number"):
        read_lora(written(tmp_path, tensors()), alpha)
