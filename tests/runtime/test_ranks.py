"""Ranks that are lost, fail, or do another job than the others; each is a process of its own."""

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import fxq.runtime.ranks as ranks_module
from fxq.runtime.ranks import TIMEOUT, Watch, WorkerError, patience
from tests.toys import toy

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 4

JOB = """
import os, signal, sys, threading, time, warnings
import torch
import fxq
from tests.toys import recipe, rows, toy

warnings.filterwarnings("ignore")
what, second = sys.argv[1], os.environ["RANK"] == "1"
torch.set_num_threads(1)
model = toy(seed=2 if what == "model" and second else 1)
data = [rows(16, 96, seed=i) for i in range(3 if what == "fewer batches" and second else 4)]
if what == "data" and second:
    data[2] = data[2] * 2
chosen = recipe(4 if what == "recipe" and second else 8)
if what == "threads" and second:
    torch.set_num_threads(2)
    warnings.resetwarnings()
try:
    with fxq.launched() as workers:
        if what == "error" and second:
            raise KeyError("of its own")
        if what in ("stopped", "killed") and second:
            print("here", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
        loader = iter(data) if what == "fewer batches" else data
        fxq.quantize(model, loader, chosen, group=workers.group, progress=False)
        print("done", flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(3)
"""


STOPS_EARLY = """
import torch.distributed
make = torch.distributed.init_process_group
def stop(*args, **options):
    if second:
        print("here", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    return make(*args, **options)
torch.distributed.init_process_group = stop
"""


@contextlib.contextmanager
def ranks(what, count=2, size=2, script=JOB):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), TIMEOUT: str(SECONDS), "WORLD_SIZE": str(size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", script, what]
    started = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}, **pipes) for rank in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def results(what, **options):
    with ranks(what, **options) as started:
        told = [process.communicate(timeout=60) for process in started]
        return [(process.returncode, *text) for process, text in zip(started, told, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "named"),
    [
        pytest.param("recipe", 'another recipe than rank 0: name is "w4a8", on rank 0 "w8a8"', marks=pytest.mark.sweep),
        pytest.param("model", "another model than rank 0: blocks.0.up.weight", marks=pytest.mark.sweep),
        pytest.param("data", "another calibration data than rank 0: batch 2", marks=pytest.mark.sweep),
        ("fewer batches", "another calibration data than rank 0: number of batches is 3, on rank 0 4"),
    ],
)
def test_ranks_with_another_job_are_an_error_on_all_of_them_that_names_rank_and_difference(what, named):
    for code, out, err in results(what):
        assert code == 3, err
        assert out.startswith("WorkerError the ranks do not do the same job: rank 1 has ") and named in out


@pytest.mark.sweep
def test_an_error_of_one_rank_is_told_to_the_other():
    (first, out, _), (second, own, _) = results("error")
    assert (first, second) == (3, 3) and own.startswith("KeyError")
    assert "rank 1 of 2 failed: KeyError: 'of its own'" in out


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal here")
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        pytest.param("stopped", f"has given no sign of life for {SECONDS} s", marks=pytest.mark.sweep),
        ("killed", "has ended without a word"),
    ],
)
def test_a_stopped_or_killed_rank_ends_the_other_with_an_error_that_names_it(what, reason):
    if what == "killed" and not pathlib.Path("/proc/self/stat").exists():
        reason = f"has given no sign of life for {SECONDS} s"
    with ranks(what) as (first, second):
        assert second.stdout.readline() == "here\n"
        start = time.monotonic()
        out = first.communicate(timeout=60)[0]
        assert time.monotonic() - start < 3 * SECONDS + 8
    assert first.returncode == 3
    assert out.startswith("WorkerError rank 0 of 2 lost another rank: rank 1 of 2 ") and reason in out


@pytest.mark.sweep
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal here")
@pytest.mark.parametrize("where", ["in the job", "before torch has made its group"])
def test_the_rank_at_which_all_meet_may_be_the_stopped_one(where):
    script = JOB.replace('["RANK"] == "1"', '["RANK"] == "0"')
    if where != "in the job":
        script = script.replace("try:\n", STOPS_EARLY + "try:\n", 1)
    with ranks("stopped", script=script) as (first, second):
        assert first.stdout.readline() == "here\n"
        out = second.communicate(timeout=60)[0]
    assert second.returncode == 3
    assert "rank 0" in out and ("has not answered for" in out or "has given no sign of life" in out)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("size", "named"),
    [(2, "rank 1 of 2 did not come within"), pytest.param(3, "rank 1 of 3 did not", marks=pytest.mark.sweep)],
)
def test_a_rank_that_never_starts_is_named_in_time(size, named):
    start = time.monotonic()
    ((code, out, _),) = results("alone", count=1, size=size)
    assert code == 3 and named in out and TIMEOUT in out
    assert time.monotonic() - start < 3 * SECONDS + 20


@pytest.mark.sweep
def test_ranks_with_other_numbers_of_threads_are_warned_of():
    done = results("threads")
    assert [code for code, _, _ in done] == [0, 0]
    assert "different numbers of threads (1, 2 by rank)" in done[1][2]


@pytest.mark.parametrize("text", ["0", "-3", "soon", "inf", "nan"])
def test_a_patience_that_is_no_time_is_refused(text, monkeypatch):
    monkeypatch.setenv(TIMEOUT, text)
    with pytest.raises(WorkerError, match="positive number of seconds"):
        patience()


def test_patience_is_the_given_one_or_that_of_the_environment(monkeypatch):
    monkeypatch.delenv(TIMEOUT, raising=False)
    assert patience() == 90
    monkeypatch.setenv(TIMEOUT, "7.5")
    assert patience() == 7.5 and patience(2) == 2


def watches(size=2, seconds=1.0, **options):
    store = torch.distributed.HashStore()
    return [Watch(lambda: store, rank, size, seconds, **options) for rank in range(size)]


def meet(*parts):
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        for done in [pool.submit(watch.meet) for watch in parts]:
            done.result(timeout=20)


def test_ranks_meet_and_part():
    first, second = watches()
    meet(first, second)
    second.end()
    first.check()
    with pytest.raises(WorkerError, match="rank 1 of 2 left: it made other calls"):
        first.meet()
    first.end()


def test_the_first_failure_is_named_and_not_those_that_follow():
    first, second, third = watches(size=3)
    third.end(ValueError("no such channel\nand more"))
    second.end(WorkerError("rank 1 of 3 lost another rank"))
    with pytest.raises(WorkerError, match=r"rank 2 of 3 failed: ValueError: no such channel\. The job ends"):
        first.meet()
    first.end()


def test_the_last_words_of_a_process_that_ends_are_heard_however_late_it_is_looked_at(monkeypatch):
    first, second = watches(seconds=5.0)
    meet(first, second)
    second.end(ValueError("no such channel"))
    monkeypatch.setattr(ranks_module, "_ended", lambda process: True)
    with pytest.raises(WorkerError, match="rank 1 of 2 failed: ValueError: no such channel"):
        first.meet()
    first.end()


def test_an_error_is_told_even_when_the_store_has_been_slow():
    said = {}

    class Slow:
        def set(self, key, value):
            time.sleep(0.3)
            said[key] = value

    late = Watch(Slow, 0, 1, 2.0)
    late._looked -= 60
    late.end(ValueError("no such channel"))
    assert "no such channel" in said["0"]


def test_a_rank_that_lives_in_the_job_is_waited_for_in_the_call():
    job = watches(seconds=0.5)
    late = Watch(torch.distributed.HashStore, 0, 2, 0.5, parent=job[0])
    meet(*job)
    time.sleep(1.2)
    assert late.lost() == ""
    job[1].end(RuntimeError("out of memory"))
    with pytest.raises(WorkerError, match="rank 1 of 2 failed: RuntimeError: out of memory"):
        late.meet()
    late.end()
    job[0].end()


def test_a_store_that_is_gone_is_an_error():
    class Gone:
        def set(self, key, value):
            raise ConnectionError("connection reset")

    watch = Watch(Gone, 0, 2, 5.0)
    with pytest.raises(WorkerError, match=r"rank 0, where the ranks meet, is gone \(ConnectionError: connection reset"):
        watch.meet()


def test_models_are_compared_by_name_shape_and_a_few_values():
    from fxq.calibration.agreement import describe_model
    from fxq.runtime.differences import differences

    one, other = describe_model(toy(seed=1)), describe_model(toy(seed=1))
    assert one == other and differences([{"model": one}, {"model": other}]) == []
    changed = toy(seed=1)
    with torch.no_grad():
        changed.head.weight[-1, -1] += 1
    (found,) = differences([{"model": one}, {"model": one}, {"model": describe_model(changed)}])
    assert found.startswith("rank 2 has another model than rank 0: head.weight is float32 [7, 96]")
