import dataclasses
import json

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from fxq.cli import plan as cli_plan
from fxq.planning.gpus import GIB, PlanningError, find_gpu
from fxq.planning.memory import CACHE_FORMATS
from fxq.planning.plan import LONGEST_MINUTES, clock, make_plan
from fxq.planning.report import plan_to_json
from fxq.planning.tables import plan_tables, real_time
from fxq.planning.workloads import find_workload

app = typer.Typer()
app.command()(cli_plan.plan)
app.command()(cli_plan.doctor)


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, list(map(str, arguments)))


def plan_of(model="self-forcing", gpu="4090", minutes=2.0, **options):
    return make_plan(find_workload(model), find_gpu(gpu), minutes, **options)


def text_of(plan):
    console = Console(width=170, record=True, force_terminal=False)
    with console.capture() as capture:
        for part in plan_tables(plan):
            console.print(part)
    return " ".join(capture.get().split())


@pytest.mark.parametrize("model", ["self-forcing", "longlive", "krea-14b"])
def test_what_fits_is_what_is_smaller_than_the_usable_memory(model):
    plan = plan_of(model, "A6000", 1.0)
    fits = plan.fits()
    assert len(fits) == 24
    for fit in fits:
        assert fit.fits == (fit.bytes <= plan.usable) == (fit.videos > 0)
        assert fit.fits == (fit.minutes is None or fit.minutes >= 1.0)


def test_the_longest_video_is_the_last_chunk_that_fits():
    plan = plan_of("self-forcing", "4090", 10.0)
    for fit in plan.fits():
        if not fit.minutes:
            continue
        stored = next(f for f in CACHE_FORMATS if fit.cache.endswith(f.name))
        frames = plan.workload.frames(fit.minutes)
        assert plan.needed(fit.weights, frames, fit.window, stored) <= plan.usable
        assert plan.needed(fit.weights, frames + 3, fit.window, stored) > plan.usable


def test_what_quantizing_takes_is_told():
    plan = plan_of()
    told, text, data = plan.quantizing(), text_of(plan), plan_to_json(plan)
    for name in ("W8A8", "W4A8"):
        ram, disk = told[name]
        assert data["quantizing"][name] == {"ram": ram, "disk": disk}
        assert f"quantizing to {name}: memory" in text and f"{ram / GIB:.2f}" in text and f"{disk / GIB:.2f}" in text
    (few, _), (more, backward) = told["W8A8"], told["W4A8"]
    small = make_plan(dataclasses.replace(find_workload("self-forcing"), latent=(16, 16)), find_gpu("4090"), 2.0)
    assert small.quantizing()["W4A8"][0] < 3e9 < few <= more < 20e9  # most of it are keys and values of a large video
    assert backward > told["W8A8"][1] + 10e9  # gradients of a call
    assert plan_of("krea-14b", "H200").quantizing()["W4A8"][0] > more


def test_one_more_video_would_not_fit():
    plan = plan_of("longlive", "L40S")
    for fit in plan.fits():
        stored = next(f for f in CACHE_FORMATS if fit.cache.endswith(f.name))
        each = plan.per_video(plan.workload.frames(2.0), fit.window, stored)
        if fit.videos:
            assert fit.bytes + (fit.videos - 1) * each <= plan.usable < fit.bytes + fit.videos * each


def test_a_window_of_a_small_model_fits_any_length_and_a_large_one_does_not_fit_at_all():
    small = {(f.weights, f.cache): f for f in plan_of("self-forcing", "4090").fits()}
    assert small["bf16", "window 21, bf16"].minutes is None
    assert 0 < small["bf16", "full, bf16"].minutes < 1 < small["W4A8", "full, klt"].minutes
    large = {(f.weights, f.cache): f for f in plan_of("krea-14b", "4090").fits()}
    assert large["bf16", "window 6, bf16"].minutes == 0 and not large["bf16", "window 6, qvg"].fits
    assert not large["W8A8", "window 6, qvg"].fits and large["W4A8", "window 6, bf16"].fits


def test_other_memory_is_taken_off():
    free, taken = plan_of(), plan_of(other=16 * GIB)
    assert free.usable - taken.usable == 16 * GIB
    assert sum(f.fits for f in taken.fits()) < sum(f.fits for f in free.fits())


def test_caches_over_time_end_at_the_asked_minute():
    rows = dict(plan_of(minutes=3.0).cache_over_time())
    assert next(iter(rows)) == "window 21, bf16" and len(rows) == 8
    assert [round(minutes, 2) for minutes, _ in rows["full, bf16"]] == [0.08, 0.5, 1, 2, 3.0]
    assert len({size for _, size in rows["window 21, bf16"]}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0.0}, "minutes = 0.0: expected more than 0"),
        ({"minutes": LONGEST_MINUTES + 1.0}, "at most 1440"),
        ({"minutes": float("nan")}, "minutes = nan"),
        ({"window": -1}, "the full cache is always shown"),
        ({"window": 2}, "a window of 2 frames cannot hold"),
        ({"other": -1}, "other memory = -1 bytes"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(PlanningError, match=message):
        plan_of(**options)


def test_the_window_is_the_models_or_that_of_training():
    assert plan_of("longlive").window == 12 and plan_of("self-forcing").window == 21
    assert plan_of("self-forcing", window=9).window == 9
    wide = dataclasses.replace(find_workload("self-forcing"), sink=24)
    assert make_plan(wide, find_gpu("H200"), 1.0).window == 27


@pytest.mark.sweep
def test_every_output_says_that_it_is_an_estimate_and_what_it_rests_on():
    plan = plan_of("krea-14b", "B200", 5.0)
    text = text_of(plan)
    for sentence in (
        "expected speed (ranges, not measurements)",
        "nothing was loaded, run or measured",
        "attainable parts of them: bf16 50% to 75%",
        "no fast path in Triton",
        "5 denoising and 1 context calls",
        "1200 latent frames are more than the 1024 positions",
    ):
        assert sentence in text
    assert "measured " not in text.replace("nothing was loaded, run or measured", "")
    data = plan_to_json(plan)
    assert data["kind"] == "estimate" and any("attainable" in line for line in data["assumptions"])
    assert json.loads(json.dumps(data))["weights"]["bf16"] == pytest.approx(28.6e9, rel=0.01)


@pytest.mark.parametrize(("fps", "answer"), [((16.0, 20.0), "yes"), ((9.0, 16.0), "perhaps"), ((9.0, 15.9), "no")])
def test_real_time_is_sure_only_when_the_slow_end_reaches_it(fps, answer):
    assert real_time(fps, 16) == answer


def test_real_time_is_answered():
    assert "real time (16/s)" in text_of(plan_of("longlive", "H200"))
    rows = {(s.arithmetic, s.moment): s.fps for s in plan_of("longlive", "H200").speeds()}
    assert rows["W8A8 optimized", "first chunk"][0] > 16 > rows["bf16 eager", "full cache, at 2 min"][1]


@pytest.mark.parametrize(("minutes", "text"), [(5 / 60, "5 s"), (0.5, "30 s"), (1, "1 min"), (2.5, "2.5 min")])
def test_clock(minutes, text):
    assert clock(minutes) == text


def test_the_command_prints_tables_or_json():
    done = invoke("plan", "longlive", "--gpu", "4090", "--minutes", "2")
    assert done.exit_code == 0 and "expected gain of W8A8" in done.output and "assumptions" in done.output
    options = ("--window", "9", "--sink", "2", "--steps", "2", "--frames-per-chunk", "1", "--other-gib", "4", "--json")
    done = invoke("plan", "longlive", "--gpu", "4090", "--minutes", "2", "--size", "256x448", *options)
    data = json.loads(done.output)
    assert data["model"]["steps"] == 2 and data["model"]["latent"] == [32, 56]
    assert (data["model"]["window"], data["model"]["sink"], data["model"]["frames_per_chunk"]) == (9, 2, 1)
    assert data["gpu"]["memory"] - data["gpu"]["usable"] == int(5.5 * GIB)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("longlive", "--gpu", "H10O"), "the closest are H100"),
        (("longliv", "--gpu", "H100"), "did you mean 'longlive'"),
        (("longlive", "--gpu", "H100", "--size", "480"), "expected as 480x832"),
        (("longlive", "--gpu", "H100", "--size", "484x832"), "multiples of 8"),
        (("longlive", "--gpu", "H100", "--window", "4"), "cannot hold 3 sink frames"),
        (("longlive", "--gpu", "H100", "--minutes", "-1"), "expected more than 0"),
    ],
)
def test_wrong_usage_is_named_and_exits_with_two(arguments, message):
    done = invoke("plan", *arguments)
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split())
