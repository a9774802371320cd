import dataclasses
import shutil

import pytest
import torch

import fxq
from fxq.comparison.bundles.contestant import Contestant, bundle_folders, contestant_of, folder_name, make_room
from fxq.comparison.methods import ComparisonError
from tests.comparison.bundles.small import CONFIG, bundle, quantized, rollout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bundle(tmp_path_factory.mktemp("bundles") / "w8")


def test_a_bundle_runs_in_the_denoisers_place(folder):
    driven = rollout()
    (found,) = bundle_folders([folder])
    made = contestant_of(found, driven)
    assert made.name == "w8" and made.bits.startswith("W8A8") and 0.4 < made.size_ratio < 0.9 and made.policy is None
    with driven.using(made.module):
        got = driven.rollout(*driven.batches[0])
    want = driven.rollout(*driven.batches[0])
    with driven.using(quantized("w8a8-dynamic")):
        plain = driven.rollout(*driven.batches[0])
    assert 0 < (got - want).square().mean() < 0.01 * want.square().mean()
    assert (got - plain).square().mean() < 1e-4 * want.square().mean()


def test_bundles_have_as_much_of_their_path_as_tells_them_apart(folder, tmp_path):
    for name in ("a/w8", "b/w8", "a/w4"):
        shutil.copytree(folder, tmp_path / name)
    named = [found.name for found in bundle_folders([tmp_path / "a" / "w8", tmp_path / "b" / "w8"])]
    assert named == ["a/w8", "b/w8"]
    assert [found.name for found in bundle_folders([tmp_path / "a" / "w8", tmp_path / "a" / "w4"])] == ["w8", "w4"]


def test_what_is_no_bundle_is_refused(folder, tmp_path):
    with pytest.raises(ComparisonError, match=r"is no bundle: it has no manifest\.json"):
        bundle_folders([tmp_path])
    with pytest.raises(ComparisonError, match="expected each once"):
        bundle_folders([folder, folder / "." / "../w8"])
    for name in ("w 8", "w_8", "full precision"):
        shutil.copytree(folder, tmp_path / name)
    for names in (("w 8", "w_8"), ("full precision",)):
        with pytest.raises(ComparisonError, match="their videos would lie in one folder; rename"):
            bundle_folders([tmp_path / name for name in names])


def test_a_bundle_of_another_model_is_refused_with_the_layer(folder):
    (found,) = bundle_folders([folder])
    wider = rollout(config=dataclasses.replace(CONFIG, ffn_dim=64))
    with pytest.raises(ComparisonError, match=r"of another model: blocks\.0\.ffn\.0 is 48 x 32 there, 64 x 32 in the"):
        contestant_of(found, wider)


def test_names_of_folders_are_plain():
    assert folder_name("out/w4 a8") == "out_w4_a8" and folder_name("..") == "_" and folder_name("w8-x.1") == "w8-x.1"


def test_room_is_made_without_what_the_loop_asks_for(monkeypatch):
    driven = rollout()
    moved = {}
    for name, part in driven.model.named_children():
        monkeypatch.setattr(part, "to", lambda device, name=name: moved.update({name: device}))
    make_room(Contestant(name="b"), driven.model)
    assert "blocks" in moved and "patch_embedding" not in moved and set(moved.values()) == {torch.device("cpu")}
    assert isinstance(driven.model, fxq.models.causal_wan.CausalWan)
