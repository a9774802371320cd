import pathlib

import pytest
import torch

from fxq.calibration import spill as module
from fxq.calibration.collect import Collector
from fxq.calibration.spill import Spill
from fxq.runtime.memory.residency import Residency
from tests.toys import rows


def in_files(folder):
    return Spill(Collector(1, 1, 0, folder=folder).allocate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_is_put_away_is_what_was_given(tmp_path, dtype):
    spill = in_files(tmp_path)
    given = [
        rows(3, 5, 7, seed=1).to(dtype),
        rows(4, 6, seed=2).to(dtype).T,
        rows(1)[0].to(dtype),
        rows(0, 3).to(dtype),
    ]
    kept = [spill.put(tensor) for tensor in given]
    for one, other in zip(given, kept, strict=True):
        assert torch.equal(one, other) and other.dtype == dtype and other.is_contiguous()
    assert not list(tmp_path.iterdir())


def test_a_tensor_larger_than_a_file_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LEAST", 1 << 13)
    monkeypatch.setattr(module, "_MOST", 1 << 13)
    spill = in_files(tmp_path)
    sizes = (100, 5000, 3, 1000, 2048)
    kept = [spill.put(rows(size, seed=size)) for size in sizes]
    assert all(torch.equal(tensor, rows(size, seed=size)) for size, tensor in zip(sizes, kept, strict=True))
    files = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert len(files) == 4  # two share one


@pytest.mark.skipif(not pathlib.Path("/proc/self/pagemap").exists(), reason="pages are given back on Linux")
def test_one_file_is_in_memory_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LEAST", 1 << 15)
    monkeypatch.setattr(module, "_MOST", 1 << 16)
    spill, residency = in_files(tmp_path), Residency()
    kept = [spill.put(rows(1024, seed=number)) for number in range(64)]
    assert residency.give_back(*kept) <= 1 << 16
    last = spill.put(rows(1024))
    spill.close()
    assert residency.give_back(last) == 0 and torch.equal(last, rows(1024))
