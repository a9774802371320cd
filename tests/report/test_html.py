import dataclasses
import html
import json
import re

import pytest

from fxq.report.html import write_report
from tests.report.example import BITS, example_report


@pytest.fixture(scope="module")
def report():
    return example_report(videos=24, clip_count=2)


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    return write_report(report, tmp_path_factory.mktemp("page") / "deep" / "report.html").read_text(encoding="utf-8")


def player(page):
    found = re.search(r'<script type="application/json" id="player-data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def test_the_page_loads_nothing(page):
    assert "://" not in page
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|WebSocket|EventSource)\b *\(", page)
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    loads = re.findall(r"""(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)|@import""", markup)
    for target in (a or b for a, b in loads):
        assert target.startswith("#"), target
    assert not re.search(r"<(link|iframe|object|embed|base)\b", page)
    assert "default-src 'none'" in page


def test_every_layer_and_variant_is_on_the_page(page, report):
    for layer in report.layers:
        assert f">{layer.layer}</th>" in page
    for variant in report.variants:
        assert f">{variant.method} {variant.bits}</th>" in page
    for variant in report.ablation:
        assert f">{html.escape(variant.method)}</th>" in page
    assert page.count('class="panel"') == sum(layer.norms is not None for layer in report.layers)
    for layer in report.layers:
        assert layer.quantized or layer.reason in page


def test_videos_come_first_and_words_are_explained(page, report):
    places = [page.index(f'<section id="{name}">') for name in ("videos", "results", "running", "comparisons", "words")]
    assert places == sorted(places) and page.index('class="lead"') < places[0]
    for word in ("W8A8", "Q-ARVD", "scorer", "teacher-forced"):
        assert word in page[places[-1] :]


def test_speed_and_memory_are_beside_full_precisions(page, report):
    _, quantized = report.running
    cells = re.findall(rf">{quantized.name}</th>((?:<td class=\"number\">[^<]*</td>)+)", page)
    assert re.findall(r">([^<]+)</td>", cells[0]) == ["50", "1.60", "1.15 MB", "1.61 MB"]


def test_references_inside_the_page_resolve(page):
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    assert {target for target in re.findall(r'href="#([^"]+)"', page)} <= ids
    assert {target for target in re.findall(r"url\(#([^)]+)\)", page)} <= ids


def test_text_keeps_its_numbers_when_drawings_are_shortened(report):
    from fxq.report import charts

    close = [dataclasses.replace(report.comparisons[0], low=0.9, ratio=0.95, high=1.0023)]
    assert "0.95 (0.90\N{EN DASH}1.002)" in charts.forest(close, charts.WIDE)


def test_hostile_text_stays_text(report, tmp_path):
    hostile = '<script>alert("x")</script></script><img src=x onerror=alert(1)>$\\frac{1}$'
    clip = dataclasses.replace(report.clips[0], prompt=hostile)
    layer = dataclasses.replace(report.layers[5], layer=hostile)
    variant = dataclasses.replace(report.variants[0], method=hostile)
    comparison = dataclasses.replace(report.comparisons[0], a=hostile)
    bad = dataclasses.replace(
        report,
        title=hostile,
        command=hostile,
        settings={hostile: hostile},
        environment={hostile: hostile},
        clips=(clip,),
        layers=(layer,),
        variants=(variant, *report.variants[1:]),
        comparisons=(comparison,),
    )
    page = write_report(bad, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img" not in page
    assert len(re.findall(r"<script\b", page)) == len(re.findall(r"</script>", page)) == 2
    assert player(page)["clips"][0]["prompt"] == hostile


def test_the_player_has_every_version_of_every_clip(page, report):
    data = player(page)
    assert data["framesPerChunk"] == 3
    for clip, original in zip(data["clips"], report.clips, strict=True):
        assert clip["reference"] == "Full precision"
        assert clip["versions"] == [f"{m} {bits}" for bits in BITS for m in ("MinMax", "Q-ARVD")]
        assert set(clip["sheets"]) == set(original.frames)
        assert all(sheet.startswith("data:image/png;base64,") for sheet in clip["sheets"].values())


def test_sprite_sheets_hold_the_frames(report):
    import base64
    import io

    import numpy as np
    from PIL import Image

    from fxq.report import html as page_module

    frames = report.clips[0].frames["Q-ARVD W4A8"]
    for limit in (8192, 100):
        page_module._SHEET_WIDTH, saved = limit, page_module._SHEET_WIDTH
        try:
            url, columns = page_module._sheet(frames)
        finally:
            page_module._SHEET_WIDTH = saved
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
        for i, frame in enumerate(frames):
            y, x = 20 * (i // columns), 20 * (i % columns)
            assert (image[y : y + 20, x : x + 20] == frame).all()


def test_a_report_with_little_in_it_is_still_a_page(report, tmp_path):
    bare = dataclasses.replace(
        report, ablation=(), ablation_comparisons=(), comparisons=(), sensitivity=(), clips=(), layers=(), seconds={}
    )
    page = write_report(bare, tmp_path / "bare.html").read_text(encoding="utf-8")
    for name in ("ablation", "comparisons", "videos", "layers", "outliers"):
        assert f'id="{name}"' not in page
    empty = dataclasses.replace(bare, variants=(), full_precision={})
    page = write_report(empty, tmp_path / "empty.html").read_text(encoding="utf-8")
    assert "No quantized model was measured." in page


def test_a_failed_write_leaves_the_old_page(report, tmp_path, monkeypatch):
    import pathlib

    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(pathlib.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    bare = dataclasses.replace(report, clips=(), layers=())
    with pytest.raises(OSError, match="full"):
        write_report(bare, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_page_of_the_tiny_model_is_small(page):
    assert len(page) < 2_000_000
