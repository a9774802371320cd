import pytest

from fxq.models.published.settings import official


def test_official_settings_stay_and_notes_go():
    settings = {"_class_name": "WanModel", "model_type": "t2v", "dim": 24, "sink_size": 1, "inject_sample_info": True}
    assert official(settings) == {"dim": 24, "sink_size": 1}


def test_the_names_of_diffusers_become_official_ones():
    found = official(
        {"num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16, "out_channels": None, "qk_norm": None}
    )
    assert found == {"num_heads": 12, "dim": 1536, "in_dim": 16, "out_dim": 16, "qk_norm": False}
    assert official({"num_frames_per_block": 3, "qk_norm": True}) == {"num_frame_per_block": 3, "qk_norm": True}


def test_images_are_refused_by_the_key_that_says_so():
    with pytest.raises(ValueError, match="added_kv_proj_dim is set: an image-to-video Wan"):
        official({"added_kv_proj_dim": 5120, "image_dim": None})


@pytest.mark.parametrize("value", [[1], {}, "layer_norm"])
def test_a_norm_that_wan_has_not_is_refused(value):
    with pytest.raises(ValueError, match="expected rms_norm_across_heads, as Wan has it"):
        official({"qk_norm": value})


def test_values_of_other_types_are_left_to_who_reads_them():
    assert official({"attention_head_dim": [0], "num_attention_heads": 10**9}) == {"num_heads": 10**9}
    assert official({"out_channels": None}) == {}
