import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.live_bytes import LiveBytes
from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Draws, Rollout
from fxq.calibration.sensitivity import chunk_sensitivity
from fxq.core.config import Budget
from fxq.models.causal_wan import CausalWanConfig
from fxq.models.checkpoints import read_tensors
from fxq.models.self_forcing import SelfForcingRollout
from fxq.passes import LowRank, Rotate, Smooth, methods
from fxq.passes.methods import descent, gptq, moments, quadratic
from fxq.planning import job
from fxq.planning.drive import Drive, drive_batches, drive_rollout
from fxq.planning.estimate import duration
from fxq.planning.job import estimate_job
from fxq.planning.memory import meta_model
from fxq.planning.speed import Speed, measure_speed
from fxq.presets import LEAST_ERROR, PRESETS, with_iterations
from tests.toys import LEARN, QUICK, problem, recipe, rows, toy, wan_rollout

SPEED = Speed(flops=1e11, search=1e-7, inputs=1e-7, learn=1e-7)
BIG = Drive(calls=105, flops=1e15, sensitivity_flops=4e15, tokens=4680, call_bytes=10**9, kept_bytes=10**9)
WEIGHTS = 2 * 64 * 96  # of a toy's quantized linears


def of_wan_14b(chosen="w8a8", **options):
    return estimate_job(meta_model(CausalWanConfig.wan_14b()), PRESETS[chosen], BIG, speed=SPEED, **options)


# Driving


def test_a_batch_is_counted_without_running_the_model():
    model, x = toy(), rows(9, 96)
    with FlopCounterMode(display=False) as counter:
        model(x)
    drive = drive_batches(model, (x,), {}, 3)
    assert drive.calls == 3 and drive.tokens == 9
    assert drive.flops == 3 * counter.get_total_flops() == 3 * 2 * 9 * (WEIGHTS + 96 * 7)
    assert drive.call_bytes > x.nbytes + 9 * 7 * 4


def counted():
    """Counts operations, attention on a CPU among them, which torch below 2.15 leaves out."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={attention: attention_operations})


def attention_operations(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


@pytest.mark.parametrize("frames", [2, 6])
@pytest.mark.parametrize("window", [-1, 4])
def test_a_self_forcing_rollout_is_counted_to_the_operation(frames, window):
    rollout = wan_rollout(frames=frames)
    sampler = dataclasses.replace(rollout.sampler, cache=CachePolicy(window=window))
    rollout = SelfForcingRollout(rollout.model, rollout.batches, sampler)
    calls = []
    with counted() as counter:
        rollout.rollout(*rollout.batches[0], on_call=lambda call, _: calls.append(call))
    drive = drive_rollout(rollout)
    assert drive.calls == len(calls)
    assert drive.flops == counter.get_total_flops()
    assert drive.tokens == 2 * 2 * 2 * 3


def test_sensitivities_cost_what_their_rollouts_cost():
    rollout = wan_rollout(frames=6)
    with counted() as counter:
        chunk_sensitivity(rollout, rollout.denoiser)
    assert drive_rollout(rollout).sensitivity_flops == pytest.approx(counter.get_total_flops(), rel=0.06)


class Adapter(Rollout):
    """A rollout of another family, of three units."""

    def units(self, condition, draws):
        return 3

    def begin(self, condition, draws):
        raise AssertionError("nothing runs in an estimate")

    advance = begin

    def example_call(self):
        return (rows(2, 5, 96),), None


def test_other_adapters_are_taken_to_make_five_calls_a_chunk_and_that_is_said():
    adapter = Adapter(toy(), [({}, Draws([1], (1, 1, 1, 1)))] * 2)
    drive = drive_rollout(adapter)
    assert drive.calls == 5 * 3 * 2 and drive.tokens == 10
    assert drive.sensitivity_flops == 3 * drive.flops  # 3 chunks, and forks of 3, 2 and 1
    assert "five calls per chunk" in drive.assumptions[0]


# Estimates


def test_quantized_layers_are_counted_and_kept_ones_are_not(tmp_path):
    estimate = estimate_job(toy(), recipe(8), speed=SPEED, out=tmp_path)
    assert estimate.time["search"] == pytest.approx(WEIGHTS * SPEED.search)
    scales = 4 * (2 * 64 + 4 + 64 + 96) + 4 * (2 * 96 + 4 + 96 + 64)
    kept = 4 * (96 * 7 + 7 + 64 + 96)
    assert estimate.disk == {"bundle": WEIGHTS + scales + kept}
    assert estimate_job(toy(), recipe(4), speed=SPEED, out=tmp_path).disk["bundle"] == WEIGHTS // 2 + scales + kept


@pytest.mark.parametrize(("scheme", "parts"), [({"bits": 6}, 0), ({"bits": 4, "weight_group": 32}, 64 * 2 + 96)])
def test_weights_in_bit_planes_count_as_files_hold_them_and_are_made_when_they_are_written(scheme, parts, tmp_path):
    eight = estimate_job(toy(), recipe(8), speed=SPEED, out=tmp_path)
    found = estimate_job(toy(), recipe(**scheme), speed=SPEED, out=tmp_path)
    stored = WEIGHTS * scheme["bits"] // 8 + parts
    assert found.disk["bundle"] - eight.disk["bundle"] == stored - WEIGHTS
    assert found.ram["writing"] - eight.ram["writing"] == stored


def test_the_phases_that_need_data_appear_only_with_data():
    model, learning = toy(), recipe(8, methods=LEARN, weighting="sensitivity")
    without = estimate_job(model, learning, speed=SPEED)
    assert without.time.keys() == {"tracing", "search"}
    assert without.ram.keys() == {"tracing", "reconstruction", "writing"}
    drive = Drive(calls=2, flops=1e9, sensitivity_flops=2e9, tokens=50)
    batches = estimate_job(model, learning, drive, speed=SPEED)
    assert batches.time.keys() == {"tracing", "search", "calibration", "reconstruction"}
    rollout = estimate_job(model, learning, drive, measures_sensitivity=True, speed=SPEED)
    assert rollout.time["sensitivity"] == pytest.approx(2e9 / 1e11 + rollout.time["search"])
    uniform = dataclasses.replace(learning, weighting="uniform")
    assert "sensitivity" not in estimate_job(model, uniform, drive, measures_sensitivity=True, speed=SPEED).time


def test_the_call_to_trace_with_is_counted_once_as_graph_and_once_as_eager():
    small, large = (drive_batches(toy(), (rows(count, 96),), {}, 1) for count in (10, 10_000))
    few, many = (estimate_job(toy(), recipe(8), example=drive, speed=SPEED) for drive in (small, large))
    assert many.ram["tracing"] - few.ram["tracing"] == 2 * (large.call_bytes - small.call_bytes)
    assert many.time["tracing"] - few.time["tracing"] == pytest.approx(2 * (large.flops - small.flops) / SPEED.flops)


def test_reconstruction_grows_with_iterations_and_skips_layers_that_are_not_learned():
    drive = Drive(calls=1, flops=1e9, tokens=50)
    few, many = (estimate_job(toy(), with_iterations(recipe(4, methods=LEARN), n), drive, speed=SPEED) for n in (3, 30))
    assert many.time["reconstruction"] == pytest.approx(10 * few.time["reconstruction"])
    assert few.time["reconstruction"] == pytest.approx(3 * WEIGHTS * SPEED.learn)
    never = recipe(4, methods=LEARN, reconstruct=False)
    assert "reconstruction" not in estimate_job(toy(), never, drive, speed=SPEED).time


def test_a_checkpoint_directory_trades_memory_for_disk(tmp_path):
    within, spilled = of_wan_14b(), of_wan_14b(folder=tmp_path)
    assert within.ram_bytes - spilled.ram_bytes > 13e9
    assert spilled.ram_bytes == within.ram_with_folder == spilled.ram_with_folder
    assert spilled.disk["checkpoint files"] > 13e9 and "checkpoint files" not in within.disk
    assert spilled.seconds == within.seconds


def test_what_a_backward_pass_needs_is_memory_or_disk(tmp_path):
    drive = Drive(calls=2, flops=1e9, tokens=50_000)
    kept = 3 * 4 * 50_000 * (64 + 96)
    for folder, phase in ((None, "ram"), (tmp_path, "disk")):
        plain, weighted = (
            estimate_job(toy(), recipe(8, weighting=weighting), drive, speed=SPEED, folder=folder)
            for weighting in ("uniform", "gradient")
        )
        more = {name: size - getattr(plain, phase)[name] for name, size in getattr(weighted, phase).items()}
        assert more.pop("calibration" if folder is None else "checkpoint files") == kept
        assert not any(more.values())


def test_sums_over_all_rows_are_memory_or_disk_and_time(tmp_path):
    drive = Drive(calls=2, flops=1e9, tokens=50_000)
    for weighting, kinds in (("uniform", 1), ("gradient", 2)):
        plain = recipe(4, methods=LEAST_ERROR, weighting=weighting)
        squares = kinds * (96**2 + 64**2)
        for folder, phase in ((None, "ram"), (tmp_path, "disk")):
            sample, summed = (
                estimate_job(toy(), dataclasses.replace(plain, all_rows=on), drive, speed=SPEED, folder=folder)
                for on in (False, True)
            )
            name = "calibration" if folder is None else "checkpoint files"
            assert getattr(summed, phase)[name] - getattr(sample, phase)[name] == 8 * squares
            more = summed.time["calibration"] - sample.time["calibration"]
            assert more == pytest.approx(2 * 100_000 * squares / SPEED.flops)
    searching = recipe(4, weighting="uniform")
    assert (
        estimate_job(toy(), dataclasses.replace(searching, all_rows=True), drive, speed=SPEED).ram
        == estimate_job(toy(), searching, drive, speed=SPEED).ram
    )


def test_data_free_14b_fits_a_small_machine(tmp_path):
    estimate = estimate_job(
        meta_model(CausalWanConfig.wan_14b()), PRESETS["w8a8-dynamic"], speed=SPEED, folder=tmp_path, out=tmp_path
    )
    assert 1e9 < estimate.ram_bytes < 4e9
    assert 14e9 < estimate.disk["bundle"] < 15e9


def test_weights_count_as_memory_only_where_they_are_in_memory(tmp_path):
    model = nn.Sequential(nn.Linear(1024, 2048, bias=False), nn.Linear(2048, 1024, bias=False))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    within = estimate_job(model, recipe(8), speed=SPEED).ram_bytes
    model.load_state_dict(read_tensors(tmp_path / "w.safetensors"), assign=True)
    assert 15e6 < within - estimate_job(model, recipe(8), speed=SPEED).ram_bytes <= 16 << 20


def test_short_memory_is_a_warning_with_a_remedy(monkeypatch):
    monkeypatch.setattr(job.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 << 20}.get)
    (warning,) = of_wan_14b().warnings()
    assert warning.startswith("memory is short: reconstruction needs about ")
    assert "with a checkpoint directory it is about " in warning
    huge = dataclasses.replace(BIG, call_bytes=10**11)
    model = meta_model(CausalWanConfig.wan_14b())
    (other,) = estimate_job(model, PRESETS["w8a8"], huge, speed=SPEED).warnings()
    assert "use a checkpoint directory and smaller videos, or fewer rows" in other


@pytest.mark.parametrize("together", [True, False])
def test_a_short_disk_is_a_warning(tmp_path, monkeypatch, together):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**11, 0, 2 * 10**10))
    out = tmp_path / "new" / "out"
    estimate = of_wan_14b("w8a8-dynamic", out=out, folder=tmp_path / "c" if together else None)
    if together:
        (warning,) = [text for text in estimate.warnings() if "disk" in text]
        assert warning.startswith("the disk is short by ")
        assert "checkpoint files" in warning and "bundle 14.5 GB" in warning
    else:
        assert estimate.disk_free == 2 * 10**10 - estimate.disk_bytes > 0
        assert not any("disk" in text for text in estimate.warnings())


def test_a_person_reads_totals_and_what_takes_longest(tmp_path):
    estimate = of_wan_14b("q_arvd-w8a8", out=tmp_path, folder=tmp_path)
    first, *warnings = estimate.lines()
    assert first.startswith("estimate: ") and " GB of RAM (of " in first and "GB bundle" in first
    assert "days; reconstruction is " in first
    assert len(warnings) == len(estimate.warnings())


def test_methods_that_solve_take_a_part_of_the_time_of_those_that_iterate():
    solving, iterating = (of_wan_14b(chosen).time["reconstruction"] for chosen in ("w4a8", "q_arvd-w4a8"))
    assert 0 < 4 * solving < iterating
    assert of_wan_14b("w4a8").time["calibration"] == pytest.approx(2 * of_wan_14b("w8a8").time["calibration"])


@pytest.mark.parametrize(("outputs", "width", "count"), [(2048, 160, 64), (8, 320, 64), (16, 64, 9000)])
@pytest.mark.parametrize(
    "most", [pytest.param(4096, id="float64"), pytest.param(0, id="float32", marks=pytest.mark.sweep)]
)
def test_the_memory_of_solving_a_layer_is_counted(outputs, width, count, most, monkeypatch):
    for module in (job, quadratic):
        monkeypatch.setattr(module, "DOUBLE", most)
    monkeypatch.setattr(moments, "_STRIP", 64)
    monkeypatch.setattr(methods, "_PART", 64)
    for module in (gptq, descent):
        monkeypatch.setattr(module, "BLOCK", 16)
    given, update, peak = problem(outputs, width, count, outliers=32), None, 0
    for method in LEAST_ERROR:
        with LiveBytes() as live:
            update = method.apply(given, update)
        peak = max(peak, live.peak)
    peak += given.weight.nbytes + given.rows.nbytes
    layer = job._Layer(outputs, width, given.scheme, group=1, leads=True)
    told = job._working_set(PRESETS["w4a8"], layer, count) - job._SCRATCH
    assert 0.6 * told < peak < told + (8 << 20)  # what a search works on at a time is in the scratch


def test_programs_read_the_same_as_json(tmp_path):
    estimate = of_wan_14b(out=tmp_path)
    data = json.loads(json.dumps(estimate.to_json()))
    assert data["ram_bytes"] == max(data["ram"].values()) == estimate.ram_bytes
    assert data["seconds"] == pytest.approx(sum(data["time"].values()))
    assert data["disk_bytes"] == sum(data["disk"].values()) and data["assumptions"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (101, "2 min"), (5900, "98 min"), (7000, "1.9 h"), (3e5, "3.5 days")],
)
def test_durations_are_read_in_one_unit(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("methods", [QUICK, LEARN], ids=["search", "learn"])
@pytest.mark.parametrize("per_token", [True, False])
def test_the_machine_is_measured_with_the_recipes_own_methods(methods, per_token):
    speed = measure_speed(recipe(4, methods=methods, per_token=per_token), torch.bfloat16)
    assert 1e8 < speed.flops < 1e15
    assert 1e-10 < speed.search < 1e-4
    assert (speed.inputs == 0) >= per_token
    assert (speed.learn > 0) == (methods is LEARN)


def test_a_budget_solves_every_layer_at_each_width_of_integers(tmp_path):
    plain = recipe(8, methods=LEARN)
    three = dataclasses.replace(plain, budget=Budget(ratio=0.4, widths=(4, 8, 16)))
    one, two = (estimate_job(toy(), chosen, BIG, speed=SPEED, folder=tmp_path) for chosen in (plain, three))
    for phase in ("search", "reconstruction"):
        assert two.time[phase] == pytest.approx(2 * one.time[phase])
    assert two.time["calibration"] == one.time["calibration"]
    assert two.disk["checkpoint files"] == one.disk["checkpoint files"] + WEIGHTS
    one, two = (estimate_job(toy(), chosen, BIG, speed=SPEED).ram for chosen in (plain, three))
    assert two["reconstruction"] == one["reconstruction"] + WEIGHTS and two["writing"] == one["writing"]


def test_transforms_cost_a_copy_of_the_weights_and_a_branch_in_the_bundle(tmp_path):
    def of(*transforms, drive=BIG):
        chosen = dataclasses.replace(recipe(4), transforms=transforms)
        return estimate_job(toy(), chosen, drive, speed=SPEED, folder=tmp_path, out=tmp_path)

    plain, turned, split, smoothed = of(), of(Rotate()), of(LowRank(3)), of(Smooth((0.5,)))
    for phase in ("calibration", "reconstruction", "writing"):
        assert turned.ram[phase] - plain.ram[phase] == 4 * WEIGHTS
    assert turned.ram["tracing"] == plain.ram["tracing"] and turned.disk == plain.disk
    assert split.disk["bundle"] - plain.disk["bundle"] == 3 * 2 * (64 + 96) * 4
    assert smoothed.time["search"] == pytest.approx(3 * plain.time["search"])
    assert of(Smooth(), drive=None).time == of(drive=None).time
