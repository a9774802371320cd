"""What is recorded: warm-up calls before, one call in the graph, outputs in memory that no other graph takes."""

import gc

import pytest
import torch

import fxq
from fxq.runtime.cuda_graphs import capture
from fxq.runtime.cuda_graphs.capture import form_of
from fxq.runtime.cuda_graphs.refusals import CudaGraphError
from tests.cuda import fake_cuda

ONES = torch.ones(4)


@pytest.fixture
def graphs(monkeypatch):
    return fake_cuda(monkeypatch)


def test_a_function_runs_for_the_warm_up_and_the_capture_alone(graphs):
    calls = []

    def function(x):
        calls.append(len(graphs.made))
        return x + 1

    run = fxq.CudaGraphs(function, device="cpu")
    for value in (1.0, 2.0, 3.0):
        assert torch.equal(run(value * ONES), (value + 1) * ONES)
    assert len(calls) == capture.WARM_UP + 1 and len(graphs.made) == 1


def test_constants_of_an_output_come_back_as_they_are(graphs):
    def function(x, scale):
        return {"y": x * scale, "rows": x.shape[0], "none": None, "two": (x, "text")}

    run = fxq.CudaGraphs(function, device="cpu")
    for scale in (2, 3, 2):
        got = run(ONES, scale)
        assert torch.equal(got["y"], scale * ONES) and (got["rows"], got["none"], got["two"][1]) == (4, None, "text")
        assert torch.equal(got["two"][0], ONES) and got["two"][0] is not ONES
    assert len(run.captures) == 2
    signs = [run(ONES, scale)["y"].signbit().any() for scale in (0.0, -0.0, 0.0)]
    assert signs == [False, True, False] and len(run.captures) == 4
    assert all(run(ONES, float("nan"))["y"].isnan().all() for _ in range(2)) and len(run.captures) == 5


def test_a_call_that_writes_into_its_input_is_refused_and_the_input_is_left_as_it_was(graphs):
    def function(x, cache):
        cache[:1] += x
        return cache * 2

    run, cache = fxq.CudaGraphs(function, device="cpu"), torch.zeros(4)
    with pytest.raises(CudaGraphError, match="the call writes into its input cache, which a replayed graph would not"):
        run(ONES[:1], cache)
    assert not cache.any() and not run.captures


def test_a_call_that_waits_for_the_device_is_refused_with_its_reason(graphs):
    run = fxq.CudaGraphs(lambda x: x * x.sum().item(), device="cpu")
    with pytest.raises(CudaGraphError, match=r"cannot be captured, RuntimeError: operation not permitted .*\.item\(\)"):
        run(ONES)
    assert not run.captures
    run = fxq.CudaGraphs(lambda x: x * (x.sum().item() if x.ndim else 2), device="cpu")
    for x, pools in ((torch.tensor(3.0), 1), (ONES, 1), (torch.tensor(3).int(), 2)):
        if x.ndim:
            with pytest.raises(CudaGraphError):
                run(x)
        else:
            assert int(run(x)) == 6
        assert len({id(graph.pool) for graph in graphs.made}) == pools  # none is used again in which one broke


def test_errors_of_the_module_itself_stay_what_they_are(graphs):
    run = fxq.CudaGraphs(lambda x, y: x @ y, device="cpu")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(torch.ones(2, 3), torch.ones(2, 3))
    assert torch.equal(run(ONES, ONES), torch.tensor(4.0))


def test_strides_of_dense_outputs_are_kept(graphs):
    run = fxq.CudaGraphs(lambda x: (x.T, x[:, :2], x[:1].expand(3, 4)), device="cpu")
    x = torch.randn(3, 4)
    for got, want in zip(run(x), (x.T, x[:, :2], x[:1].expand(3, 4)), strict=True):
        assert torch.equal(got, want) and got.stride() == want.clone().stride()


def test_a_leaf_is_written_as_dtype_and_shape():
    assert form_of(torch.zeros(1, 2, dtype=torch.bfloat16)) == "bfloat16[1, 2]"
    assert form_of(torch.tensor(1)) == "int64[]" and form_of(3.5) == "3.5" and form_of(None) == "None"


def test_no_weight_that_autocast_keeps_is_captured_and_nothing_is_collected_meanwhile(graphs):
    seen = []

    def function(x):
        seen.append((torch.is_autocast_cache_enabled(), gc.isenabled()))
        return x * 2

    run = fxq.CudaGraphs(function, device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(ONES)
        assert torch.is_autocast_cache_enabled()
    assert seen == [(False, True)] * capture.WARM_UP + [(False, False)] and gc.isenabled()
    with pytest.raises(CudaGraphError):
        fxq.CudaGraphs(lambda x: x.sum().item(), device="cpu")(ONES)
    assert gc.isenabled() and torch.is_autocast_cache_enabled()
