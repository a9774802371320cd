import pytest
import torch
from safetensors.torch import save_file

from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.checkpoints import CheckpointError
from fxq.models.families import FAMILIES, Family, with_settings
from fxq.models.loading import layout, load_causal_wan, seen_sizes
from fxq.models.published.foreign import FOREIGN, foreign_names

SMALL = CausalWanConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=1, text_dim=20, in_dim=4, out_dim=4)
NAMES = {
    "MAGI-1": "videodit_blocks.layers.0.self_attention.linear_qkv.q.weight",
    "LongCat-Video": "blocks.0.adaLN_modulation.1.weight",
    "Matrix-Game 2": "blocks.3.action_model.keyboard_embed.0.weight",
    "VACE": "vace_blocks.0.before_proj.weight",
    "Wan-Animate": "motion_encoder.enc.fc.0.weight",
    "Wan-S2V": "audio_injector.injector.0.q.weight",
    "HunyuanVideo": "double_blocks.0.img_attn_qkv.weight",
    "an image-to-video Wan": "img_emb.proj.0.weight",
}


def test_every_family_has_a_name_here():
    assert set(NAMES) == {family.name for family in FOREIGN}


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_family_is_refused_by_name_with_the_reason_and_the_way_out(name, tmp_path):
    state = CausalWan(SMALL).state_dict() if name.startswith(("Matrix", "VACE", "an image", "Wan")) else {}
    save_file({**state, NAMES[name]: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    family = Family(name="small", source="a test", config=SMALL)
    for read in (lambda path: load_causal_wan(path, family), seen_sizes):
        with pytest.raises(CheckpointError, match=rf"holds {name}: .*Only text-to-video causal Wan.*(docs/|--model)"):
            read(tmp_path / "a.safetensors")


def test_an_image_to_video_model_with_game_modules_is_the_game():
    assert foreign_names(["img_emb.proj.0.weight", NAMES["Matrix-Game 2"]]).startswith("Matrix-Game 2: ")


@pytest.mark.parametrize("family", ["self-forcing", "krea-14b"])
def test_no_causal_wan_is_taken_for_another(family):
    assert foreign_names(layout(FAMILIES[family].config)) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "i2v"}, "model_type 'i2v': an image-to-video Wan"),
        ({"model_type": "vace"}, "model_type 'vace': VACE"),
        ({"model_type": "other"}, "model_type 'other': only text-to-video"),
        ({"_class_name": "LongCatVideoTransformer3DModel"}, "LongCat-Video: another transformer"),
        ({"image_dim": 1280}, "image_dim is set: an image-to-video Wan"),
        ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm': expected rms_norm_across_heads"),
    ],
)
def test_configs_of_other_families_are_refused_by_name(settings, message):
    with pytest.raises(CheckpointError, match=message):
        with_settings(FAMILIES["causal-wan"], settings)
