import pathlib

import pytest
import torch

from fxq.comparison.bundles import memory


def test_a_peak_that_is_over_does_not_count_where_the_system_can_forget_it():
    if not memory._CLEAR.exists():
        pytest.skip("no /proc/self/clear_refs")
    large = torch.ones(40_000_000)
    with memory.watched(torch.device("cpu")) as before:
        held = before()
    del large
    with memory.watched(torch.device("cpu")) as peak:
        assert peak() < held - 100_000_000
        more = torch.ones(40_000_000)
        del more
        assert peak() > held - 60_000_000, "what was freed again counts"
    assert "process" in memory.kind_of(torch.device("cpu")) and "GPU" in memory.kind_of(torch.device("cuda"))


def test_elsewhere_it_is_the_peak_so_far(monkeypatch):
    monkeypatch.setattr(memory, "_CLEAR", pathlib.Path("/no/such/file"))
    with memory.watched(torch.device("cpu")) as peak:
        assert peak() > 0
