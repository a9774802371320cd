import html
import json
import re

from fxq.comparison.bundles import tables
from fxq.comparison.bundles.page import render, write
from tests.comparison.bundles.example import results, row


def test_the_page_shows_every_number_of_the_table_and_every_video():
    found = results()
    page = render(found)
    for bundle in found.rows:
        line = re.search(rf">{bundle.name}</th>.*?</tr>", page, re.DOTALL)[0]
        assert re.findall(r'number">(.*?)</td>', line) == [column.text(bundle) for column in tables.columns(found)]
    assert re.findall(r'<video src="([^"]+)" controls', page) == list(found.clips)
    assert "2. a | dog &lt;b&gt;" in page and html.escape(tables.markdown_table(found), quote=False) in page
    assert "Not measured: LPIPS, FVD and VBench" in page


def test_the_page_needs_no_network_and_plays_only_what_lies_beside_it():
    page = render(results())
    assert "://" not in page and "default-src 'none'" in page and "media-src 'self'" in page
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= ids
    assert "#fe0" not in page


def test_animated_pictures_take_the_place_of_videos_and_without_a_decoder_there_are_none():
    page = render(results(clips=("videos/side_by_side/001.webp",)))
    assert '<img src="videos/side_by_side/001.webp"' in page and "<video" not in page
    page = render(results(clips=(), space="latents"))
    assert 'id="videos"' not in page and "no decoder was given" in page


def test_hostile_names_stay_text():
    hostile = '<script>alert("x")</script>'
    page = render(results(title=hostile, prompts=(hostile, hostile), rows=(row(hostile, [[50.0, 40.0]] * 2),)))
    assert "<script" not in page


def test_all_files_are_written(tmp_path):
    found = results()
    written = write(found, tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(path.name for path in written)
    assert json.loads((tmp_path / "report" / "compare.json").read_text())["rows"][1]["forced_psnr_worst"] == 35
    assert (tmp_path / "report" / "compare.md").read_text() == tables.to_markdown(found)
