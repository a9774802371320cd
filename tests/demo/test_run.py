import json

import pytest
import torch

import fxq
from fxq.core.rows import Weighting
from fxq.demo.run import DemoSettings, run_demo
from fxq.demo.store import Finished
from fxq.lab import ablation_recipes, tiny_rollout, weighting_recipes
from fxq.metrics import sprites
from fxq.models.tiny import load_tiny
from fxq.presets import PRESETS, minmax
from fxq.report.html import write_report
from fxq.report.tables import report_to_json

SETTINGS = DemoSettings(
    calibration_videos=2, evaluation_videos=2, iterations=6, clips=1, bits=("w4a8",), ablation_bits=""
)


@pytest.fixture(scope="module")
def demo():
    return run_demo(SETTINGS, "fxq demo", progress=False)


@pytest.fixture(scope="module")
def plain():
    """The run with its three methods in name only, each as fast as MinMax."""
    quick = minmax(PRESETS["w4a8"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxq.demo.run.PRESETS", {"w4a8": quick, "q_arvd-w4a8": quick})
        return run_demo(SETTINGS, "fxq demo", progress=False)


@pytest.fixture(scope="module")
def wide():
    settings = DemoSettings(calibration_videos=3, evaluation_videos=5, iterations=12, clips=2, bits=("w8a8", "w4a8"))
    return run_demo(settings, "fxq demo", progress=False)


def test_the_shipped_model_does_what_the_prompt_says():
    rollout, conditions = tiny_rollout(load_tiny(), 64, seed=11, unseen=True)
    videos = torch.cat([rollout.rollout(*batch) for batch in rollout.batches])
    scores = sprites.score(videos, conditions).means()
    assert scores["shape"] >= 0.95
    assert scores["colour"] >= 0.95
    assert scores["motion"] >= 0.9


def test_a_prompt_of_another_word_changes_the_video():
    rollout, conditions = tiny_rollout(load_tiny(), 4, seed=5, unseen=True)
    shuffled = conditions.clone()
    shuffled[:, 1] = (shuffled[:, 1] + 1) % 6
    video = rollout.rollout(*rollout.batches[0])
    assert sprites.score(video, shuffled).means()["colour"] <= 0.25


def test_ablation_adds_one_part_at_a_time():
    recipes = ablation_recipes(fxq.PRESETS["q_arvd-w4a8"])
    assert list(recipes)[-1] == "+ all three (Q-ARVD)"
    assert recipes["+ all three (Q-ARVD)"] == fxq.PRESETS["q_arvd-w4a8"]
    assert all(not r.scheme.dual_scale for r in recipes["+ reconstruction"].rules if r.scheme)
    assert recipes["+ reconstruction, dual scale"].weighting == "uniform"
    assert {r.weighting for r in weighting_recipes(fxq.PRESETS["q_arvd-w4a8"]).values()} == set(Weighting)


@pytest.mark.sweep
def test_a_run_that_was_killed_goes_on_with_the_same_report(tmp_path, monkeypatch):
    finished = Finished(tmp_path, {})
    killed, modules = run_demo(SETTINGS, "fxq demo", progress=False, finished=finished)
    monkeypatch.setattr("fxq.lab.Lab.quantized", lambda *given: pytest.fail("quantized again"))
    again, modules_again = run_demo(SETTINGS, "fxq demo", progress=False, finished=finished)
    first, second = (report_to_json(report) for report in (killed, again))
    for told in (first, second):
        assert told.pop("seconds")
        assert all(row.pop("seconds") > 0 for row in told["running"])
    assert first == second
    assert {*modules} == {*modules_again}


@pytest.mark.sweep
def test_the_preset_beats_q_arvd_which_beats_minmax_at_four_bits_teacher_forced(demo):
    report, _ = demo
    ratios = {(c.bits, c.a): c for c in report.comparisons if c.metric == "teacher_forced"}
    assert ratios["W4A8", "Q-ARVD"].high < 1
    assert ratios["W4A8", "Least error"].high < 0.7


@pytest.mark.sweep
def test_eight_bits_are_closer_than_four_and_parts_are_measured_alone(wide, tmp_path):
    report, _ = wide
    assert [v.method for v in report.ablation] == list(ablation_recipes(fxq.PRESETS["q_arvd-w4a8"]))
    assert {(c.a, c.b) for c in report.ablation_comparisons} >= {("+ dual scale", "round to nearest")}
    assert 'id="ablation"' in write_report(report, tmp_path / "report.html").read_text(encoding="utf-8")
    ratios = {(c.bits, c.a): c for c in report.comparisons if c.metric == "teacher_forced"}
    assert ratios["W8A8", "Least error"].ratio < 1.3, "three videos are few to fit weights of 8 bits to"
    for method in ("MinMax", "Q-ARVD", "Least error"):
        error = {v.bits: v.teacher_forced.mean() for v in report.variants if v.method == method}
        assert error["W8A8"] < 0.5 * error["W4A8"]


@pytest.mark.slow
def test_sizes_are_real(plain):
    report, modules = plain
    for variant in report.variants:
        assert variant.size_ratio <= (0.55 if variant.bits == "W8A8" else 0.30), variant.bits
    for module in modules.values():
        stored = {t.dtype for name, t in module.named_buffers() if name.endswith("self_attn.q.weight")}
        assert stored <= {torch.int8, torch.uint8}


@pytest.mark.slow
def test_the_report_and_its_json_are_written(plain, tmp_path):
    report, _ = plain
    page = write_report(report, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "blocks.3.ffn.2" in page and 'id="ablation"' not in page
    data = json.loads(json.dumps(report_to_json(report)))
    assert len(data["variants"]) == 3
