from fxq.export.hub.use import EXPORTS, use_of
from fxq.export.interop import TARGETS


def test_every_target_has_its_words():
    assert {*TARGETS, "diffusers"} <= {*EXPORTS}
    assert "'mine'" in use_of("mine", "me/x", "w.safetensors")


def test_a_bundle_is_loaded_by_name():
    said = use_of("", "me/x", "model.safetensors")
    assert 'fxq.load("me/x")' in said and "fxq verify me/x" in said
