"""The steps of a quantization, each from the stage before it."""

import dataclasses

import pytest
import torch

from fxq.cache.codecs import Klt
from fxq.cache.policy import CachePolicy
from fxq.calibration.calibrate import Batch
from fxq.calibration.collect import CalibrationError
from fxq.capture.trace import trace
from fxq.core.config import Rule, Scheme, with_budget
from fxq.core.ir import Stage
from fxq.job import Job, needs_data, uses_data
from fxq.presets import PRESETS
from fxq.runtime.progress import Progress
from tests.runtime.test_ranks import results
from tests.toys import LEARN, recipe, rows, toy

STATIC, PER_TOKEN = Rule("*.up", Scheme()), Rule("*", Scheme(per_token=True))


def job(chosen=None, **options):
    return Job(chosen or recipe(), Progress(False), **options)


def planned(made):
    graph = trace(toy(), (rows(9, 96),))
    made.plan(graph)
    return graph


def calibrated(made, chunks=1):
    graph = planned(made)
    data = made.calibrate(graph, [Batch((rows(9, 96, seed=c),), chunk=c) for c in range(chunks)])
    return graph, data


@pytest.mark.parametrize(
    ("rules", "needs"),
    [((PER_TOKEN,), ""), ((Rule("*", None),), ""), ((PER_TOKEN, STATIC), "*.up"), ((), "")],
)
def test_a_recipe_needs_data_for_its_first_rule_with_static_scales(rules, needs):
    assert needs_data(dataclasses.replace(recipe(), rules=rules)) == needs


def test_a_budget_uses_data_whatever_scales_and_methods_do():
    chosen = PRESETS["w4a8-dynamic"]
    assert not uses_data(chosen) and uses_data(with_budget(chosen, bits_per_weight=5))
    assert not needs_data(with_budget(chosen, bits_per_weight=5))


def test_each_step_takes_the_graph_one_stage_further():
    made = job()
    graph = planned(made)
    assert graph.stage == Stage.PLANNED and len(graph.quantized_plans) == 2
    data = made.calibrate(graph, [(rows(9, 96),)])
    assert graph.stage == Stage.CALIBRATED and set(graph.statistics) == {"blocks.0.up", "blocks.0.down"}
    assert len(data) == 64 and int(data, 16)
    made.choose_integers(graph)
    assert graph.stage == Stage.CALIBRATED and set(graph.updates) == set(graph.statistics)
    made.rewrite(graph)
    assert graph.stage == Stage.FROZEN and not graph.updates


def test_the_hash_of_the_data_is_the_datas():
    made = job()
    hashes = [made.calibrate(planned(made), [(rows(9, 96, seed=seed),)]) for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_without_data_a_graph_is_calibrated_with_nothing():
    graph = planned(job())
    assert job().calibrate(graph, None) == "" and graph.stage == Stage.CALIBRATED and not graph.statistics


def test_initialised_is_a_fork_with_the_first_method_alone():
    made = job(recipe(methods=LEARN))
    graph, _ = calibrated(made)
    first = made.initialised(graph)
    assert (first.stage, graph.stage) == (Stage.LOWERED, Stage.CALIBRATED) and not graph.updates
    assert made.methods(first_only=True).methods == LEARN[:1] and made.methods().methods == LEARN


def test_a_folder_keeps_layers_and_the_first_method_apart(tmp_path):
    made = job(recipe(methods=LEARN), folder=tmp_path)
    assert made.methods().checkpoint.folder == tmp_path
    assert made.methods(first_only=True).checkpoint.folder == tmp_path / "initial"
    assert job().methods().checkpoint is None


@pytest.mark.parametrize("weighting", ["sensitivity", "reversed"])
def test_chunks_weigh_the_same_where_sensitivity_is_not_known(weighting):
    made = job(recipe(weighting=weighting))
    graph, data = calibrated(made, chunks=2)
    assert made.weigh_chunks(graph, [], None, data) is None
    assert graph.chunk_weights.tolist() == [1, 1]


def test_a_given_sensitivity_weighs_chunks_and_must_have_all_of_them():
    made = job(recipe(weighting="sensitivity"))
    graph, data = calibrated(made, chunks=2)
    alpha = torch.tensor([0.75, 0.25])
    assert made.weigh_chunks(graph, [], alpha, data) is alpha
    assert graph.chunk_weights.tolist() == [1.5, 0.5]
    with pytest.raises(CalibrationError, match="sensitivity has 1 chunks, the calibration data 2"):
        made.weigh_chunks(graph, [], alpha[:1], data)


def test_steps_of_a_job_have_its_label():
    named = []

    class Told(Progress):
        def step(self, name):
            named.append(name)
            return super().step(name)

    made = Job(recipe(), Told(False), label="2 of 3: ")
    graph, _ = calibrated(made)
    made.choose_integers(graph)
    assert named == ["2 of 3: calibrate", "2 of 3: choose integers"]


def test_codecs_that_learn_from_calibration_need_data():
    cache = CachePolicy(keys=Klt(1.0, fit="model"))
    dynamic = PRESETS["w8a8-dynamic"]
    assert not uses_data(dynamic) and uses_data(dataclasses.replace(dynamic, cache=cache))
    with pytest.raises(CalibrationError, match=r"learn from rollouts: give a fxq\.Rollout"):
        job().cache_tables(planned(job()), [], cache, "")
    assert job().cache_tables(planned(job()), [], CachePolicy(keys=Klt(1.0)), "") is None


SHARED = """
import dataclasses, hashlib, sys, warnings
import torch
import fxq
from fxq.cache.codecs import Klt
from fxq.cache.policy import CachePolicy
from fxq.models.self_forcing import SelfForcingRollout
from tests.toys import wan_rollout

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
parts = [wan_rollout(seeds=(s, s + 1), frames=4) for s in (1, 5, 9)]
model = parts[0].model
rollout = SelfForcingRollout(model, [part.batches[0] for part in parts], parts[0].sampler)
seen, old = [], SelfForcingRollout.cached_tokens
SelfForcingRollout.cached_tokens = lambda self, *a: (seen.append(1), old(self, *a))[1]
cache = CachePolicy(keys=Klt(1.0, fit="model"), values=Klt(2.0, fit="model"), span=1)
chosen = dataclasses.replace(fxq.PRESETS["w8a8-dynamic"], cache=cache)

def told(group):
    q = fxq.quantize(model, rollout, chosen, group=group, progress=False)
    held = {n: t for n, t in q.named_buffers() if n.startswith("cache_tables.")}
    assert len(held) == 8
    return hashlib.sha256(b"".join(t.view(torch.uint8).numpy().tobytes() for t in held.values())).hexdigest()

if sys.argv[1] == "alone":
    print(told(None), len(seen))
else:
    with fxq.launched() as workers:
        print(told(workers.group), len(seen), flush=True)
"""


@pytest.mark.sweep
def test_ranks_share_the_videos_that_codecs_learn_from():
    ((code, alone, err),) = results("alone", count=1, size=1, script=SHARED)
    assert code == 0, err
    both = results("ranks", script=SHARED)
    assert all(code == 0 for code, _, _ in both), both
    (first, some), (second, others) = (out.split() for _, out, _ in both)
    assert first == second == alone.split()[0]
    assert int(some) + int(others) == 3 == int(alone.split()[1]) and min(int(some), int(others)) > 0
