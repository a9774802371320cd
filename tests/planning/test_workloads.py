import dataclasses
import json

import pytest

from fxq.models.causal_wan import CausalWanConfig
from fxq.models.families import FAMILIES
from fxq.models.self_forcing import SamplerConfig
from fxq.planning.gpus import PlanningError
from fxq.planning.workloads import WORKLOADS, Workload, find_workload

OFFICIAL = {
    "_class_name": "CausalWanModel",
    "dim": 3072,
    "ffn_dim": 14336,
    "num_heads": 24,
    "num_layers": 30,
    "model_type": "t2v",
}


def config_file(folder, data):
    path = folder / "config.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_self_forcing_is_the_shipped_sampler():
    workload, sampler = find_workload("self-forcing"), SamplerConfig()
    assert workload.config == CausalWanConfig.wan_1_3b()
    assert (workload.steps, workload.frames_per_chunk) == (len(sampler.steps), sampler.frames_per_chunk)
    assert (workload.window, workload.sink) == (sampler.cache.window, sampler.cache.sink)
    assert (workload.tokens_per_frame, workload.chunk_tokens, workload.calls) == (1560, 4680, 5)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_planning_and_calibration_take_one_loop_per_model(workload):
    loop = FAMILIES[workload.name].sampler
    assert workload.config == FAMILIES[workload.name].config
    assert workload.steps == len(loop.timesteps(first=False))
    assert (workload.frames_per_chunk, workload.window, workload.sink) == (
        loop.frames_per_chunk,
        loop.cache.window,
        loop.cache.sink,
    )


def test_krea_denoises_in_five_steps_down_to_zero():
    assert find_workload("krea-14b").steps == 5
    assert FAMILIES["krea-14b"].sampler.timesteps(False) == pytest.approx((1000, 937.5, 833.333, 625, 0), abs=1e-3)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_name_is_found_in_any_case(workload):
    assert find_workload(workload.name.upper()) == workload


def test_minutes_become_whole_chunks():
    workload = find_workload("self-forcing")
    assert [workload.frames(minutes) for minutes in (0.001, 0.0125, 0.02, 1)] == [3, 3, 6, 240]
    assert dataclasses.replace(workload, frames_per_chunk=7).frames(1) == 245
    assert workload.kept_frames(30, 21) == 21 and workload.kept_frames(30, -1) == 30


def test_an_official_config_is_read(tmp_path):
    settings = {"local_attn_size": 12, "sink_size": 3, "num_frame_per_block": 1, "patch_size": [1, 2, 2]}
    path = config_file(tmp_path, OFFICIAL | settings)
    for name in (str(path), str(tmp_path)):
        workload = find_workload(name)
        assert (workload.config.dim, workload.config.head_dim) == (3072, 128)
        assert (workload.window, workload.sink, workload.frames_per_chunk) == (12, 3, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "cannot be read as a model's config.json"),
        ("[1]", "expected a JSON object"),
        ({"num_attention_heads": 12, "num_layers": 30}, "has no dim, ffn_dim, num_heads: expected the official"),
        (OFFICIAL | {"num_heads": 7}, "must split into 7 heads"),
        (OFFICIAL | {"patch_size": [2, 2, 2]}, "one frame per token"),
        (OFFICIAL | {"local_attn_size": 2}, "a window of 2 frames cannot hold"),
    ],
)
def test_a_file_that_is_no_causal_wan_config_is_refused(data, message, tmp_path):
    with pytest.raises(PlanningError, match=message):
        find_workload(str(config_file(tmp_path, data)))


def test_a_missing_file_and_an_unknown_name_are_told_apart(tmp_path):
    with pytest.raises(PlanningError, match="cannot be read"):
        find_workload(str(tmp_path / "none.json"))
    with pytest.raises(PlanningError, match="unknown model 'selfforcing'; did you mean 'self-forcing'"):
        find_workload("selfforcing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": (61, 104)}, r"latent size \(61, 104\) is no multiple of patch 2"),
        ({"latent": (0, 104)}, "no multiple"),
        ({"steps": 0}, "steps = 0, expected at least 1"),
        (
            {"window": 5, "sink": 3},
            "window of 5 frames cannot hold 3 sink frames and a chunk of 3; use -1 or at least 6",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(PlanningError, match=message):
        Workload(name="some", config=CausalWanConfig(), **change)
