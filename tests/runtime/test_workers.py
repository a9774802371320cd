"""Jobs on two ranks, each a process of its own."""

import hashlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from fxq.calibration.collect import Collector
from fxq.runtime.workers import Workers
from tests.published import options
from tests.toys import rows

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
QUANTIZE = ["--videos", "2", "--batch", "1", "--iterations", "20", "--quiet"]


def torchrun(*words, ranks=2):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]


def run(command, timeout=240):
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def digests(bundle):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in bundle.iterdir() if f.name != "manifest.json"}


SHARE = """
import torch, torch.distributed as dist
from fxq.runtime.workers import Workers, launched
with launched() as workers:
    told = workers.gather({"rank": torch.tensor(workers.rank), "half": torch.full((2, workers.rank), 1.5).bfloat16()})
    assert [int(t["rank"]) for t in told] == [0, 1], told
    assert [tuple(t["half"].shape) for t in told] == [(2, 0), (2, 1)] and told[1]["half"].dtype == torch.bfloat16
    packed = workers.share({"q": torch.arange(6, dtype=torch.uint8).view(2, 3).t()} if workers.rank else None, 1)
    assert packed["q"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert workers.share({}, 0) == {}
    assert Workers.of(workers.group) == workers and workers.first == (workers.rank == 0)
print("done")
"""


def test_tensors_of_any_dtype_and_shape_reach_all_ranks(tmp_path):
    script = tmp_path / "share.py"
    script.write_text(SHARE)
    assert run(torchrun(str(script))).count("done") == 2


def test_one_process_alone_needs_no_group():
    alone = Workers.of(None)
    assert alone.first and alone.gather({"x": torch.ones(2)})[0]["x"].tolist() == [1, 1]
    assert alone.owners([3, 1, 2]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("costs", "owners"), [([5, 1, 1, 1, 2], [0, 1, 1, 1, 1]), ([1, 1, 1, 1], [0, 1, 0, 1]), ([], [])]
)
def test_work_is_spread_by_its_cost(costs, owners):
    assert Workers(size=2).owners(costs) == owners
    assert Workers(rank=1, size=2).owners(costs) == owners


class Ranks:
    """Workers whose collectors are all in one process: the states of the others are given."""

    def __init__(self, rank, states):
        self.rank, self.size, self.states = rank, len(states), states

    def gather(self, tensors):
        layer = next((k for k in ("layer",) if k in tensors), None)
        if layer:
            return [{"layer": torch.tensor(1)} for _ in self.states]
        return [state._state("layer") for state in self.states]


@pytest.mark.parametrize(("per_call", "most"), [(4, 1000), (9, 10), (100, 7)])
def test_ranks_that_took_turns_have_what_one_process_has(per_call, most):
    def collect(batches):
        collector = Collector(per_call, most, seed=3, all_rows=True)
        for batch in batches:
            collector.batch, collector.chunk = batch, batch % 2
            for call in range(3):
                collector.add("layer", rows(5 + 7 * batch + call, 6, seed=10 * batch + call))
        return collector

    alone = collect(range(6)).finish()["layer"]
    others = [collect(range(1, 6, 3)), collect(range(2, 6, 3))]
    merged = collect(range(0, 6, 3))
    merged.merge(Ranks(0, [collect(range(0, 6, 3)), *others]))
    found = merged.finish()["layer"]
    assert found.seen == alone.seen
    for name in ("low", "high", "rows", "chunks", "weights"):
        assert torch.equal(getattr(found, name), getattr(alone, name)), name
    assert found.sums.count == alone.sums.count == found.seen
    moments, want = found.sums.moments(False), alone.sums.moments(False)
    assert torch.allclose(moments.mean, want.mean, rtol=1e-13)
    assert torch.allclose(moments.covariance, want.covariance, rtol=1e-12)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return [*options(tmp_path_factory.mktemp("model"), num_layers=2), *QUANTIZE]


@pytest.fixture(scope="module")
def single(words, tmp_path_factory):
    """The bundle that one process writes, by recipe."""
    made = {}

    def bundle(recipe):
        if recipe not in made:
            out = tmp_path_factory.mktemp("single") / recipe
            run([sys.executable, "-m", "fxq", "quantize", *words, "--recipe", recipe, "--out", str(out)])
            made[recipe] = out
        return made[recipe]

    return bundle


def check_equal(out, single, printed):
    """The bundle of two ranks is that of one process, and one rank prints."""
    assert digests(out) == digests(single)
    facts = [json.loads((folder / "manifest.json").read_text())["facts"] for folder in (out, single)]
    assert facts[0]["sensitivity"] == facts[1]["sensitivity"]
    assert facts[0]["calibration_hash"] == facts[1]["calibration_hash"]
    assert json.loads(printed)


@pytest.mark.sweep
@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w4a8"])
def test_two_ranks_write_the_bundle_of_one(recipe, words, single, tmp_path):
    out = tmp_path / "bundle"
    printed = run(torchrun("-m", "fxq", "quantize", *words, "--recipe", recipe, "--out", str(out), "--json"))
    check_equal(out, single(recipe), printed)


CHOOSE = """
import dataclasses, sys
import fxq
from fxq.runtime.workers import launched
from tests.toys import recipe, rows, toy

def bundle(group=None):
    chosen = dataclasses.replace(recipe(4), budget=fxq.Budget(bits_per_weight=5.5))
    data = [rows(12, 96, seed=seed) for seed in range(3)]
    module = fxq.quantize(toy(blocks=3), data, chosen, group=group, progress=False)
    return fxq.summary(module).facts["widths"], module.state_dict()

with launched() as workers:
    (widths, both), (alone_widths, alone) = bundle(workers.group), bundle()
assert widths == alone_widths and set(widths["layers"].values()) == {4, 8}, widths
assert all(both[name].equal(alone[name]) for name in alone) and both.keys() == alone.keys()
print("equal")
"""


@pytest.mark.sweep
def test_two_ranks_choose_the_widths_of_one(tmp_path):
    (tmp_path / "choose.py").write_text(CHOOSE)
    assert run(torchrun(str(tmp_path / "choose.py"))).count("equal") == 2


BY_TIME = """
import dataclasses
import fxq
from fxq.passes import kernel_times
from fxq.runtime.workers import launched
from tests.toys import recipe, rows, toy

def seconds(size, schemes):
    assert workers.rank == 0, "only the first rank measures"
    return [1e-9 * size.inputs * size.outputs * (16 if s is None else s.weight_bits) for s in schemes]

def bundle(group=None):
    chosen = dataclasses.replace(recipe(4), budget=fxq.Budget(time=0.4))
    data = [rows(12, 96, seed=seed) for seed in range(3)]
    module = fxq.quantize(toy(blocks=3), data, chosen, group=group, progress=False)
    return fxq.summary(module).facts["widths"], module.state_dict()

kernel_times.kernel_seconds = seconds
with launched() as workers:
    widths, both = bundle(workers.group)
    if workers.rank == 0:
        alone_widths, alone = bundle()
        assert widths == alone_widths and set(widths["layers"].values()) == {4, 8} and widths["time"] <= 0.4, widths
        assert all(both[name].equal(alone[name]) for name in alone) and both.keys() == alone.keys()
print("widths", sorted(widths["layers"].items()), widths["time"])
"""


@pytest.mark.sweep
def test_two_ranks_keep_to_the_times_that_the_first_measures(tmp_path):
    (tmp_path / "choose.py").write_text(BY_TIME)
    printed = [line for line in run(torchrun(str(tmp_path / "choose.py"))).splitlines() if line.startswith("widths")]
    assert len(printed) == 2 and len(set(printed)) == 1


@pytest.mark.sweep
def test_two_ranks_rewrite_the_graph_as_one_does(words, tmp_path):
    names = ("Rotate", "Smooth", "LowRank")
    chosen = {"extends": "w4a6", "methods": [{"method": "RangeSearch"}], "weighting": "sensitivity"}
    chosen["transforms"] = [{"transform": name} for name in names]
    (tmp_path / "chosen.json").write_text(json.dumps(chosen))
    command = ["-m", "fxq", "quantize", *words, "--recipe", str(tmp_path / "chosen.json"), "--json"]
    alone = json.loads(run([sys.executable, *command, "--out", str(tmp_path / "one")]))
    run(torchrun(*command, "--out", str(tmp_path / "two")))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert dict(alone["facts"]["passes"]).keys() >= set(names)


@pytest.mark.sweep
def test_two_ranks_measure_the_sensitivity_of_one():
    words = ["sensitivity", "--model", "tiny", "--videos", "2", "--batch", "1", "--json"]
    alone = json.loads(run([sys.executable, "-m", "fxq", *words]))
    assert json.loads(run(torchrun("-m", "fxq", *words))) == alone


def ranks_of(process):
    """Process ids by rank of the workers that a torchrun process started."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            environment = dict(e.partition("=")[::2] for e in (folder / "environ").read_text().split("\0"))
        except (OSError, IndexError):
            continue
        if parent == str(process.pid) and "LOCAL_RANK" in environment:
            found[int(environment["LOCAL_RANK"])] = int(folder.name)
    return found


@pytest.mark.sweep
@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_job_and_a_rerun_resumes(words, single, tmp_path):
    out, checkpoints = tmp_path / "bundle", tmp_path / "checkpoints"
    recipe = ["--recipe", "q_arvd-w4a8", "--out", str(out), "--checkpoint-dir", str(checkpoints)]
    command = torchrun("-m", "fxq", "quantize", *words, *recipe)
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 120
        while not list(checkpoints.glob("blocks.*.safetensors")):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(ranks_of(job)[1], signal.SIGKILL)
        errors = job.communicate(timeout=120)[1]
    assert job.returncode != 0 and "SIGKILL" in errors
    assert not out.exists()
    kept = {f: f.stat().st_mtime_ns for f in checkpoints.glob("*.safetensors")}
    check_equal(out, single("q_arvd-w4a8"), run([*command, "--json"]))
    assert kept and all(f.stat().st_mtime_ns == time_ for f, time_ in kept.items())


LOST = """
import os, torch
from fxq.runtime.workers import WorkerError, launched
with launched() as workers:
    try:
        workers.gather({})
        if workers.rank:
            os._exit(7)
        workers.gather({"x": torch.ones(3)})
    except WorkerError as error:
        print(error, flush=True)
        os._exit(3)
"""


@pytest.mark.sweep
def test_a_lost_rank_is_an_error_and_no_hang(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(2):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank)}
        words = [sys.executable, "-c", LOST]
        ranks.append(subprocess.Popen(words, env=ENVIRONMENT | place, stdout=subprocess.PIPE, text=True))
    try:
        told = ranks[0].communicate(timeout=120)[0]
        assert [rank.wait(60) for rank in ranks] == [3, 7]
    finally:
        for rank in ranks:
            rank.kill()
    assert "rank 0 of 2 lost another rank" in told and "Run the same command again" in told
