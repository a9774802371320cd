import pathlib

import pytest
import torch

from fxq.calibration import collect as collect_module
from fxq.calibration.calibrate import statistics_hash
from fxq.calibration.collect import CalibrationError, Collector
from fxq.runtime.memory.residency import Residency
from tests.toys import rows


def collect(folder=None, per_call=9, most=10, dtype=torch.float32):
    collector = Collector(per_call, most, 5, folder=folder)
    for batch in range(4):
        collector.batch, collector.chunk = batch, batch
        for call in range(3):
            for layer, width in (("a", 8), ("b", 600)):
                collector.add(layer, rows(3 + 9 * call, width, seed=7 * batch + call).to(dtype))
        collector.give_back()
    return collector.finish()


@pytest.mark.parametrize(("per_call", "most"), [(4, 1000), (9, 10), (100, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_files_are_those_in_memory(tmp_path, per_call, most, dtype):
    in_memory, in_files = collect(None, per_call, most, dtype), collect(tmp_path / "new", per_call, most, dtype)
    for layer in ("a", "b"):
        for name in ("low", "high", "rows", "chunks", "seen"):
            one, other = getattr(in_memory[layer], name), getattr(in_files[layer], name)
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), name
        assert in_files[layer].rows.dtype == dtype


@pytest.mark.skipif(not pathlib.Path("/proc/self/pagemap").exists(), reason="pages are given back on Linux")
def test_rows_in_files_leave_no_trace_and_can_leave_memory(tmp_path):
    statistics = collect(tmp_path, 200, 1000)
    assert list(tmp_path.iterdir()) == []
    before = statistics["b"].rows.clone()
    assert Residency().give_back(statistics["b"].rows) > 0
    assert torch.equal(statistics["b"].rows, before)


@pytest.mark.skipif(not pathlib.Path("/proc/self/pagemap").exists(), reason="pages are given back on Linux")
def test_few_rows_in_files_are_in_memory_while_a_call_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(collect_module, "_TOUCHED", 1 << 18)
    collector, resident = Collector(100, 400, 0, folder=tmp_path), Residency()
    for layer in range(20):
        collector.add(f"layer {layer}", rows(100, 256, seed=layer))
    left = resident.give_back(*(sample.stored for sample in collector._samples.values()))
    assert 6 * left < 20 * 100 * 256 * 4  # of all rows
    statistics = collector.finish()
    assert resident.give_back(*(found.rows for found in statistics.values())) == 0
    statistics_hash(statistics)
    assert resident.give_back(*(found.rows for found in statistics.values())) == 0


def test_the_sample_does_not_depend_on_the_order_of_batches():
    found = []
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        collector = Collector(6, 11, 0)
        for batch in order:
            collector.batch = collector.chunk = batch
            collector.add("layer", rows(20, 4, seed=batch))
        found.append(collector.finish()["layer"])
    for name in ("low", "high", "rows", "chunks"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))


def test_every_call_has_the_same_share_of_the_sample():
    collector = Collector(50, 400, 1)
    for batch, count in enumerate((50, 5000)):  # a call with many rows keeps no more of them than one with few
        for call in range(20):
            collector.batch, collector.chunk = 100 * batch + call, batch
            collector.add("layer", rows(count, 2, seed=call))
    share = collector.finish()["layer"].chunks.float().mean().item()
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("spilled", [False, True])
def test_sums_are_of_all_rows_and_not_of_the_sample(tmp_path, spilled):
    x, gradients = rows(500, 6), torch.rand(500, generator=torch.Generator().manual_seed(0))
    collector = Collector(9, 9, 0, leaders={"b": "a"}, folder=tmp_path if spilled else None, all_rows=True)
    for batch, (part, own) in enumerate(zip(x.split(100), gradients.split(100), strict=True)):
        collector.batch = batch
        for layer in ("a", "b"):
            collector.add(layer, part, own)
        collector.give_back()
    found = collector.finish()
    sums = found["a"].sums
    assert len(found["a"].rows) == 9 and sums.count == 500 and found["b"].sums is sums
    assert torch.allclose(sums.moments(False).mean, x.double().mean(0))
    assert torch.allclose(sums.moments(False).covariance, x.double().T.cov(correction=0))
    assert len(sums.squares) == 2 and sums.gradient == pytest.approx(float(gradients.double().sum()))
    assert statistics_hash(found) != statistics_hash({"a": found["a"]})
    assert list(tmp_path.iterdir()) == []


def test_another_seed_is_another_sample():
    def sample(seed):
        collector = Collector(5, 5, seed)
        collector.add("layer", rows(100, 3))
        return collector.finish()["layer"].rows

    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))


def test_values_that_are_not_finite_are_refused_by_layer():
    with pytest.raises(CalibrationError, match="layer x: its input has NaN or infinity"):
        Collector(5, 5, 0).add("x", torch.tensor([[1.0, torch.inf]]))
