import shutil

import pytest
import torch

import fxq
from fxq.export.hub.card import Card
from fxq.export.hub.client import HubError
from fxq.export.hub.fetch import FILES
from fxq.export.hub.push import push
from tests.toys import rows

CARD = Card(repository="me/toy")


def test_what_was_pushed_loads_and_computes_the_same(hub, bundle, tmp_path):
    (tmp_path / "frames.png").write_bytes(b"picture")
    address = push(bundle, Card(repository="me/toy", pictures=(tmp_path / "frames.png",)))
    assert address.startswith(hub.address) and len(hub.commits) == 1
    assert {*hub.repositories["me/toy"]} == {*FILES, "README.md", "frames.png"}
    x = rows(5, 96)
    assert torch.equal(fxq.load("me/toy")(x), fxq.load(bundle)(x))


def test_a_damaged_bundle_is_not_sent(hub, bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "b")
    with (folder / "graph.json").open("a") as file:
        file.write(" ")
    with pytest.raises(fxq.BundleError, match=r"graph\.json"):
        push(folder, CARD)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["extra.bin", "run.py", "a.onnx"])
def test_what_would_not_be_fetched_is_not_pushed(hub, bundle, tmp_path, name):
    folder = shutil.copytree(bundle, tmp_path / "b")
    (folder / name).write_bytes(b"x")
    with pytest.raises(HubError, match=f"holds what is not pushed: {name}"):
        push(folder, CARD)
    assert hub.requests == []


def test_links_are_not_followed(hub, bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "b")
    (folder / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(HubError, match="holds what is not pushed: notes"):
        push(folder, CARD)


def test_a_name_that_is_no_repository_is_refused(bundle):
    with pytest.raises(HubError, match=r"'toy' is no repository: expected org/name"):
        push(bundle, Card(repository="toy"))
