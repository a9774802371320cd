import json
import os
import subprocess
import sys

import pytest
import torch

import fxq
from fxq.export.hub.client import HubError, UnreachableError
from fxq.export.hub.fetch import FILES, check_listing, fetch_bundle, locate
from tests.export.hub.server import COMMIT
from tests.toys import rows

FINE = dict.fromkeys(FILES, 100)


@pytest.fixture
def served(hub, bundle):
    hub.repositories["org/toy"] = {name: (bundle / name).read_bytes() for name in FILES} | {"README.md": b"# toy"}
    return hub


def cached(tmp_path):
    """Names of the files in the cache."""
    return sorted(file.name for file in (tmp_path / "cache").rglob("*") if file.is_symlink())


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_repository_loads_as_its_folder_does(served, bundle, revision, tmp_path):
    x = rows(5, 96)
    assert torch.equal(fxq.load("org/toy", revision=revision)(x), fxq.load(bundle)(x))
    assert cached(tmp_path) == sorted(FILES)


def test_what_is_cached_is_not_fetched_again(served):
    fetch_bundle("org/toy")
    served.requests.clear()
    assert fetch_bundle("org/toy").name == COMMIT
    assert not [request for request in served.requests if request.startswith("GET /org/toy/resolve")]


def test_without_a_network_the_cache_serves_with_a_warning(served, monkeypatch, bundle):
    from huggingface_hub import constants

    folder = fetch_bundle("org/toy")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match=r"the cached revision a+ is used"):
        assert fetch_bundle("org/toy") == folder
    with pytest.raises(UnreachableError, match=r"org/other on http://127\.0\.0\.1:9 does not answer"):
        fetch_bundle("org/other")
    with pytest.raises(UnreachableError, match="there is no folder org/other here, and org/other on"):
        locate("org/other")


def test_another_process_loads_offline_from_the_cache(served, bundle, tmp_path):
    fetch_bundle("org/toy")
    served.close()
    code = (
        "import sys, torch, fxq; x = torch.linspace(-1, 1, 960).view(10, 96);"
        "print(torch.equal(fxq.load('org/toy')(x), fxq.load(sys.argv[1])(x)))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(bundle)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300, check=True
    )
    assert done.stdout.strip() == "True"


def test_a_broken_download_leaves_nothing_and_goes_on_later(served, tmp_path):
    served.cut = 2000
    with pytest.raises(HubError):
        fetch_bundle("org/toy")
    assert "model.safetensors" not in cached(tmp_path)
    served.cut = None
    fxq.load("org/toy")


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("org/none", None, "org/none on http.*: no such repository, or a private one"),
        ("org/toy", "v9", "has no revision 'v9': expected a branch, a tag or a commit"),
    ],
)
def test_what_is_not_there_is_said(served, name, revision, message, tmp_path):
    with pytest.raises(HubError, match=message):
        fxq.load(name, revision=revision)
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": 1}, r"may hold code \(pytorch_model.bin\): nothing is fetched"),
        ({"modeling.py": 1}, "may hold code"),
        ({"../../.bashrc.json": 1}, "leads out of its folder"),
        ({"/etc/x.json": 1}, "leads out of its folder"),
        ({"a\\b.json": 1}, "leads out of its folder"),
        ({"graph.json": 1 << 40}, "graph.json has 1099511627776 bytes, at most"),
        ({"manifest.json": None}, "does not say how large manifest.json is"),
        ({f"{i}.json": 1 for i in range(1001)}, "has 1004 files"),
    ],
)
def test_a_poisoned_list_is_refused_before_anything_is_fetched(files, message):
    check_listing("org/toy", FINE | {"README.md": 7, ".gitattributes": 9, "sub/picture.webp": 9})
    with pytest.raises(HubError, match=message):
        check_listing("org/toy", FINE | files)


def test_a_list_is_judged_by_name_of_what_is_missing():
    with pytest.raises(HubError, match=r"is no bundle of fxq: it has no graph.json, model.safetensors"):
        check_listing("org/toy", {"manifest.json": 5})


def test_poisoned_repositories_leave_nothing_behind(served, tmp_path):
    served.repositories["org/toy"]["weights.pkl"] = b"cos\nsystem\n(S'x'\ntR."
    with pytest.raises(HubError, match="may hold code"):
        fxq.load("org/toy")
    assert cached(tmp_path) == [] and not any("resolve" in request for request in served.requests)


def test_tensors_larger_than_the_manifest_says_are_not_fetched(served, tmp_path):
    served.sizes["model.safetensors"] = 1 << 40
    with pytest.raises(HubError, match="has 1099511627776 bytes, its manifest states tensors of"):
        fxq.load("org/toy")
    assert cached(tmp_path) == []


def test_altered_content_is_refused_as_in_a_folder(served):
    files = served.repositories["org/toy"]
    files["graph.json"] = json.dumps(json.loads(files["graph.json"]) | {"x": 1}).encode()
    with pytest.raises(fxq.BundleError, match=r"graph.json"):
        fxq.load("org/toy")


def test_a_link_in_the_repository_is_text_and_refused(served, tmp_path):
    served.repositories["org/toy"]["model.safetensors"] = b"../../../etc/passwd"
    with pytest.raises(HubError, match="its manifest states tensors of"):
        fxq.load("org/toy")
    assert cached(tmp_path) == []


def test_paths_are_paths(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert locate("out/missing") == locate(tmp_path / "out").relative_to(tmp_path) / "missing"
    for path in (tmp_path, "/nowhere/at/all", "single", "a/b/c"):
        assert str(locate(path)) == str(path)
    with pytest.raises(fxq.BundleError, match="a folder has no revision 'main'"):
        locate(tmp_path, "main")
    assert served.requests == []
