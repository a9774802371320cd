"""What is left in the process of work that is done: nothing, however often it is done."""

import gc
import itertools
import linecache
import logging
import pathlib
import statistics
import tempfile
import threading
import tracemalloc

import pytest
import torch
from torch import fx

import fxq
from tests.toys import recipe, rows, toy

OFTEN = 7
ALLOWED = 24_000
"""Bytes a call: caches of Python fill with names of fx's classes; a graph that stays is 100 kB and more."""


def collect():
    """Collect garbage, and what that has set free."""
    for _ in range(3):
        gc.collect()


def generated():
    """Sources that fx keeps, and that tracebacks would show."""
    kept = fx.graph_module._loader.eval_cache
    return set(kept) | {name for name in linecache.cache if name.startswith("<eval_with_key>")}


def files():
    folder = pathlib.Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def mapped():
    maps = pathlib.Path("/proc/self/maps")
    return sum("safetensors" in line for line in maps.read_text().splitlines()) if maps.exists() else 0


@pytest.fixture
def frozen():
    """What other tests left is not looked through again at every collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def growth(call):
    """Bytes of Python objects that a call leaves, the median of several: torch's tables grow by leaps now and then."""
    logging.disable()  # pytest keeps what torch logs, and its trace asks for no level
    trace = logging.getLogger("torch.__trace")
    handlers, trace.handlers = trace.handlers, []
    for _ in range(8):
        call()
    collect()
    tracemalloc.start()
    try:
        call()
        collect()
        held = [tracemalloc.get_traced_memory()[0]]
        for _ in range(OFTEN):
            call()
            collect()
            held.append(tracemalloc.get_traced_memory()[0])
        return statistics.median(after - before for before, after in itertools.pairwise(held))
    finally:
        tracemalloc.stop()
        trace.handlers = handlers
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    model, x, chosen = toy(), rows(32, 96), recipe()
    module = fxq.quantize(model, [x], chosen, progress=False)
    folder = fxq.save(module, tmp_path_factory.mktemp("growth") / "bundle")
    return {
        "load": lambda: fxq.load(folder),
        "quantize": lambda: fxq.quantize(model, [x], chosen, progress=False),
        "optimize": lambda: fxq.optimize(module),
        "save": lambda: fxq.save(module, folder),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["load", "quantize", *(pytest.param(w, marks=pytest.mark.sweep) for w in ("optimize", "save"))]
)
def test_work_that_is_repeated_leaves_no_memory_files_or_threads_behind(what, job, frozen, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other processes come and go in the common one
    job[what]()
    collect()
    places = len(list(tmp_path.iterdir()))
    sources, before = len(generated()), (files(), threading.active_count(), mapped())
    grown = growth(job[what])
    assert grown < ALLOWED, f"{grown:.0f} bytes a call"
    # By number: the source of the module that a call returns may stand for that of the call before.
    assert len(generated()) <= sources
    assert (files(), threading.active_count(), mapped()) == before
    assert len(list(tmp_path.iterdir())) == places


@pytest.mark.sweep
def test_the_source_of_a_module_lives_as_long_as_the_module():
    module = fxq.quantize(toy(), [rows(32, 96)], recipe(), progress=False)
    collect()
    own = type(module).forward.__code__.co_filename
    assert linecache.getlines(own) and own in generated()
    optimized = fxq.optimize(module)
    assert generated() - {own}
    del module, optimized
    collect()
    assert own not in generated()


@pytest.mark.sweep
def test_modules_of_others_keep_their_source():
    module = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()))
    own = type(module).forward.__code__.co_filename
    fxq.optimize(fxq.quantize(toy(), [rows(32, 96)], recipe(), progress=False))
    collect()
    assert "linear" in "".join(linecache.getlines(own)) or "getattr" in "".join(linecache.getlines(own))
