import pytest
import torch

from fxq.runtime.checkpoint import Checkpoint

KEY = "a" * 64


def equal(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


TENSORS = {"weight": torch.arange(12, dtype=torch.int8).view(3, 4).t(), "scale": torch.ones(2), "none": torch.ones(0)}


def test_a_piece_comes_back_under_its_key_only(tmp_path):
    store = Checkpoint(tmp_path / "new" / "folder")
    assert store.read("blocks.0.up", KEY) is None
    assert equal(store.write("blocks.0.up", KEY, TENSORS), TENSORS)
    assert equal(store.read("blocks.0.up", KEY), TENSORS)
    assert store.read("blocks.0.up", "b" * 64) is None and store.read("blocks.0.down", KEY) is None


@pytest.mark.parametrize("size", [0, 7, 40, -1])
def test_a_damaged_piece_does_not_count(tmp_path, size):
    store = Checkpoint(tmp_path)
    store.write("x", KEY, TENSORS)
    content = store.path("x").read_bytes()
    store.path("x").unlink()
    store.path("x").write_bytes(content[:size])
    assert store.read("x", KEY) is None


def test_names_stay_inside_the_folder(tmp_path):
    store = Checkpoint(tmp_path)
    store.write("../a/b with 2 more", KEY, TENSORS)
    (file,) = tmp_path.rglob("*")
    assert file.parent == tmp_path and file.name.startswith("_a_b_with_2_more-")


def test_a_piece_that_is_written_again_leaves_the_older_tensors_alone(tmp_path):
    store = Checkpoint(tmp_path)
    older = store.write("x", KEY, {"w": torch.zeros(5000)})
    store.write("x", KEY, {"w": torch.ones(5000)})
    assert not older["w"].any() and store.read("x", KEY)["w"].all()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="taken"):
        Checkpoint(tmp_path / "taken").write("x", KEY, TENSORS)
