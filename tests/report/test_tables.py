import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from fxq.report.tables import ablation_table, comparison_lines, main_table, report_to_json, significant
from fxq.report.verdict import ablation_sentence, comparison_sentence, headline, ratio_text, verdict
from tests.report.example import compare, example_report


@pytest.fixture(scope="module")
def report():
    return example_report(videos=24, clip_count=1)


def text_of(table, width=180):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def with_comparison(report, ratio, low, high):
    changed = [dataclasses.replace(c, ratio=ratio, low=low, high=high) for c in report.comparisons]
    return dataclasses.replace(report, comparisons=tuple(changed))


def test_win_loss_and_tie_have_their_own_sentences(report):
    first = report.comparisons[0]
    win = dataclasses.replace(first, ratio=0.31, low=0.28, high=0.34)
    assert comparison_sentence(win) == (
        "Q-ARVD has 0.31x the teacher-forced error of MinMax (95 % interval 0.28 to 0.34)."
    )
    assert ablation_sentence(win) == "helped"
    loss = dataclasses.replace(first, ratio=1.4, low=1.2, high=1.6)
    assert comparison_sentence(loss).startswith("Q-ARVD is worse than MinMax: 1.40x the teacher-forced error")
    assert ablation_sentence(loss) == "did not help: made it worse"
    tie = dataclasses.replace(first, ratio=0.97, low=0.9, high=1.002)
    assert "cannot be told apart" in comparison_sentence(tie)
    assert "to 1.002, which contains 1" in comparison_sentence(tie)
    assert ablation_sentence(tie) == "did not help: no effect resolved"


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0.3, 0.2, 0.4), "is lower at W8A8, W4A8 and W4A6."),
        ((1.3, 1.2, 1.4), "is higher at W8A8, W4A8 and W4A6."),
        ((1.0, 0.9, 1.1), "is not resolvably different at W8A8, W4A8 and W4A6."),
    ],
)
def test_the_lead_follows_the_comparisons(report, numbers, words):
    assert words in verdict(with_comparison(report, *numbers)).lead


def with_scores(report, **scores):
    changed = [dataclasses.replace(v, scores=v.scores | scores) for v in report.variants]
    return dataclasses.replace(report, variants=tuple(changed))


def test_the_lead_follows_the_scores(report):
    same = verdict(with_scores(report, **report.full_precision))
    assert "The scorer cannot tell Q-ARVD at W8A8, W4A8 and W4A6 from full precision." in same.lead
    lost = verdict(with_scores(report, motion=0.2))
    assert "cannot tell" not in lost.lead
    assert "sees a loss for Q-ARVD at W8A8 (motion 0.20 vs 0.95)" in lost.lead
    gained = verdict(with_scores(dataclasses.replace(report, full_precision={"motion": 0.2}), motion=0.9))
    assert "puts Q-ARVD at W8A8, W4A8 and W4A6 above full precision" in gained.lead
    unscored = verdict(dataclasses.replace(report, full_precision={}))
    assert unscored.lead.startswith("Nothing was scored for Q-ARVD at W8A8")
    assert "The scorer" not in unscored.lead


def test_few_videos_are_called_few():
    few = example_report(videos=6, clip_count=1)
    assert "6 videos, which is few" in verdict(few).caveat


def test_ratios_never_round_onto_one():
    assert ratio_text(1.0) == "1.00"
    assert ratio_text(0.9981) == "0.998"
    assert ratio_text(1.00004) == "1.00004"
    assert ratio_text(0.0312) == "0.031"


def test_significant_digits():
    assert [significant(x) for x in (0, 0.01234, 12.345, 1234.5, 1e-7)] == ["0", "0.0123", "12.3", "1234", "1.00e-07"]


def test_tables_name_every_variant(report):
    main, ablation = text_of(main_table(report)), text_of(ablation_table(report))
    assert "Full precision" in main
    for v in report.variants:
        assert f"{v.method} {v.bits}" in main
    for v in report.ablation:
        assert v.method in ablation
    text_of(ablation_table(dataclasses.replace(report, ablation=())))
    text_of(main_table(dataclasses.replace(report, variants=())))


def test_80_columns_hold_every_number(report):
    for table, variants in ((main_table(report), report.variants), (ablation_table(report), report.ablation)):
        text = text_of(table, 80)
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
        for v in variants:
            for number in (f"{v.size_ratio:.2f}x", f"{v.latent_mse.mean():.2e}", f"{v.psnr.mean():.1f}"):
                assert number in text


def test_the_headline_needs_no_glossary(report):
    assert headline(with_scores(report, **report.full_precision)) == (
        "With 4-bit weights the model has 0.31 of its size in bfloat16, and an independent scorer sees no loss."
    )
    assert headline(with_scores(report, motion=0.2)).endswith("an independent scorer sees what it lost.")
    assert headline(dataclasses.replace(report, full_precision={})).endswith("of its size in bfloat16.")
    assert headline(dataclasses.replace(report, variants=())) == ""


def test_markup_in_names_is_printed(report):
    odd = dataclasses.replace(report.variants[0], method="[red]x[/red]")
    assert "[red]x[/red] W8A8" in text_of(main_table(dataclasses.replace(report, variants=(odd,))))


def test_comparison_lines_state_the_outcome(report):
    lines = comparison_lines(report)
    assert len(lines) == len(report.comparisons) + len(report.ablation_comparisons)
    assert "W4A8 teacher-forced error: Q-ARVD / MinMax = 0." in "\n".join(lines)


def test_json_round_trips(report):
    encoded = report_to_json(report)
    assert json.loads(json.dumps(encoded, allow_nan=False)) == encoded
    variant = encoded["variants"][0]
    assert variant["latent_mse"] == report.variants[0].latent_mse.tolist()
    low, high = variant["latent_mse_interval95"]
    assert low < variant["latent_mse_mean"] < high
    assert "norms" not in encoded["layers"][0]
    assert "frames" not in encoded["clips"][0]
    assert encoded["comparisons"][0]["outcome"] in ("lower", "higher", "unresolved")


def test_json_has_no_infinities(report):
    same = dataclasses.replace(report.variants[0], psnr=np.full(24, np.inf))
    encoded = report_to_json(dataclasses.replace(report, variants=(same,)))
    json.dumps(encoded, allow_nan=False)
    assert encoded["variants"][0]["psnr_mean"] is None


def test_identical_models_compare_as_a_tie(report):
    assert "cannot be told apart" in comparison_sentence(compare(report.variants[0], report.variants[0]))
