"""The benchmark of what an encoded cache costs, at a size that takes seconds."""

import json
import sys

import pytest
import torch

from benchmarks import cache_cost
from benchmarks.cache_cost import Sizes, measure

SMALL = Sizes(heads=2, width=32, hidden=64, text=8, rows=3, columns=4, span=2, calls=2)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_sizes_are_those_of_wan():
    assert Sizes().new == 4680 and Sizes().old == 37_440
    known = cache_cost.codecs(Sizes())
    assert (known["qvg"].centroids, known["qvg"].block) == (256, 64)


def test_every_codec_has_its_shares():
    with torch.inference_mode():
        found = measure(SMALL, 2)
    exact = found.pop("exact")
    assert exact["chunk"] == pytest.approx(2 * (exact["linears"] + exact["attention"]))
    assert set(found) == set(cache_cost.codecs(SMALL))
    for row in found.values():
        assert all(value > 0 for value in row.values())
        assert row["commit, share of its chunk"] == pytest.approx(row["commit"] / exact["chunk"])
        assert row["commit, share of the span's compute"] == pytest.approx(row["commit"] / exact["chunk"] / 2)
        assert row["unpack, share of a chunk"] == pytest.approx(2 * row["unpack"] / exact["chunk"])


def test_the_command_writes_what_it_measured_and_how(tmp_path, monkeypatch):
    out = tmp_path / "cost.json"
    words = ["--out", str(out), "--rounds", "1", "--heads", "2", "--width", "32", "--hidden", "64", "--text", "8"]
    monkeypatch.setattr(sys, "argv", ["cache_cost.py", *words, "--rows", "3", "--columns", "4", "--span", "2"])
    cache_cost.main()
    told = json.loads(out.read_text())
    assert told["sizes"]["rows"] == 3 and "attention over bf16" in told["layer"]["qvg"]
    assert told["command"].endswith(
        "--rounds 1 --heads 2 --width 32 --hidden 64 --text 8 --rows 3 --columns 4 --span 2"
    )
