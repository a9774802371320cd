import json
import pathlib
import re

import pytest
import torch
from safetensors.torch import save, save_file
from typer.testing import CliRunner

from fxq.cli import app
from fxq.cli.options.models import ModelFiles, found_weights, make_rollout
from fxq.export.hub.client import HubError, UnreachableError
from fxq.export.hub.weights import check_sizes, choose, fetch_weights, locate_weights
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from tests.published import SETTINGS


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return CausalWan(CausalWanConfig(**SETTINGS)).state_dict()


@pytest.fixture
def served(hub, state):
    """A repository of a small causal Wan beside other files."""
    found_weights.cache_clear()
    hub.repositories["org/wan"] = {
        "README.md": b"# wan",
        "self_forcing.pt": b"pickled",
        "transformer/config.json": json.dumps(SETTINGS | {"model_type": "t2v"}).encode(),
        "transformer/model.safetensors": save(state),
        "vae/vae.safetensors": save({"x": torch.zeros(2)}),
    }
    return hub


def asked(hub):
    return [request.rpartition("/")[2] for request in hub.requests if request.startswith("GET /org/wan/resolve")]


def test_a_pattern_chooses_the_file_and_its_settings_come_with_it(served, state):
    model = make_rollout("causal-wan", 1, 0, ModelFiles(checkpoint=pathlib.Path("org/wan:transformer/*")), driven=False)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.model.state_dict().items())
    assert asked(served) == ["config.json", "model.safetensors"]


def test_the_command_line_takes_it_where_a_file_is_expected(served, tmp_path):
    command = ["inspect", "causal-wan", "--checkpoint", "org/wan@main:transformer/model*", "--recipe", "w8a8", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert {row["bits"] for row in json.loads(done.stdout)} > {"-"}


def test_a_folder_of_several_files_is_one(hub, state, tmp_path):
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    hub.repositories["org/parts"] = {file: save({n: state[n] for n in part}) for file, part in parts.items()}
    hub.repositories["org/parts"]["model.safetensors.index.json"] = json.dumps(index).encode()
    folder = fetch_weights("org/parts")
    assert {path.name for path in folder.iterdir()} == {*parts, "model.safetensors.index.json"}


def test_without_a_network_the_cache_serves(served, monkeypatch):
    from huggingface_hub import constants

    file = fetch_weights("org/wan", None, "transformer/*")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match="what the cache holds is used"):
        assert fetch_weights("org/wan", None, "transformer/*") == file
    with pytest.raises(UnreachableError, match=r"there is no org/other here, and org/other on .* does not answer"):
        locate_weights("org/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_weights("org/wan", None, "transformer/*") == file


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (None, r"no weights at its top: choose from transformer/model.safetensors, vae/vae.safetensors by a pattern"),
        ("*.safetensors", r"in 2 folders \(transformer, vae\): choose one"),
        ("*.pt", "no weights by the pattern '\\*.pt': choose from"),
        ("nothing*", "no weights by the pattern 'nothing\\*': choose from"),
    ],
)
def test_what_a_pattern_does_not_say_is_asked(served, pattern, message):
    with pytest.raises(HubError, match=message):
        fetch_weights("org/wan", None, pattern)
    assert asked(served) == []


def test_pickles_are_not_fetched_and_the_way_out_is_named():
    with pytest.raises(HubError, match=r"a\.pt, a kind of file that may hold code, .* `hf download` it"):
        choose("org/x", ["a.pt", "README.md"], "*.pt")
    with pytest.raises(HubError, match=r"'w/\*' means files that may hold code \(w/run\.py\)"):
        choose("org/x", ["w/a.safetensors", "w/run.py"], "w/*")
    with pytest.raises(HubError, match="leads out of its folder"):
        choose("org/x", ["../a.safetensors"], "*")
    with pytest.raises(HubError, match=r"no \.safetensors at all"):
        choose("org/x", ["README.md"], None)
    assert choose("org/x", ["a.safetensors", "run.py", "config.json"], None) == ["config.json", "a.safetensors"]


def test_sizes_are_compared_with_the_disk_first():
    check_sizes("org/x", {"config.json": 10, "a.safetensors": 90}, 100)
    with pytest.raises(HubError, match=r"2 files of 0\.00 GB do not fit on the disk of the hub's cache"):
        check_sizes("org/x", {"config.json": 10, "a.safetensors": 91}, 100)
    with pytest.raises(HubError, match=r"does not say how large a\.safetensors is"):
        check_sizes("org/x", {"a.safetensors": None}, 100)
    with pytest.raises(HubError, match=re.escape(f"config.json has {1 << 40} bytes, at most")):
        check_sizes("org/x", {"config.json": 1 << 40}, 1 << 50)


def test_what_is_here_is_a_path(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    save_file({"x": torch.zeros(2)}, tmp_path / "out" / "m.safetensors")
    for path in ("out/m.safetensors", "out/missing.safetensors", "model.pt", "/nowhere/at/all.pt", "a/b/c.pt"):
        assert locate_weights(path) == pathlib.Path(path)
    assert served.requests == []
