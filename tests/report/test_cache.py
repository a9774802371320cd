"""The page on a rollout's cache."""

import dataclasses
import json
import re

import numpy as np
import pytest

from fxq.cache.codecs import Klt
from fxq.cache.policy import CachePolicy
from fxq.cache.settings import policy_to_json
from fxq.metrics.cache_run import CacheRun
from fxq.report.cache import cache_to_json, decibels, render, sentences, write_cache_report

CHUNKS = 5
RUN = CacheRun(
    policy=policy_to_json(CachePolicy(keys=Klt(1.0), span=2)),
    exact=(3_000_000, 6_000_000, 3_500_000, 6_500_000, 4_000_000),
    packed=(0, 0, 200_000, 200_000, 400_000),
    plain=(3_000_000, 6_000_000, 9_000_000, 12_000_000, 15_000_000),
    mse=np.array([[0, 0, 1e-4, 3e-4, 2e-4], [0, 0, 1e-4, 1e-4, 2e-4]]),
    scores={"shape": (1.0, 1.0, 1.0, 0.5, 1.0)},
    reference_scores={"shape": (1.0,) * CHUNKS},
    commit=(0.0, 0.0, 0.2, 0.0, 0.1),
    seconds=(1.0,) * CHUNKS,
    largest=2.0,
)


@pytest.fixture(scope="module")
def page():
    return render(RUN, "Cache of <ring>", "fxq generate --report x.html", {"torch": "2"})


def test_the_page_loads_and_runs_nothing(page):
    assert "://" not in page and "<script" not in page and "default-src 'none'" in page
    assert "Cache of &lt;ring&gt;" in page and "<ring>" not in page


def test_every_chunk_has_a_row_and_every_measure_a_chart(page):
    body = re.search(r"<tbody>(.*?)</tbody>", page, re.DOTALL)[1]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[3] == ["4", "6.50 MB", "200 kB", "12.0 MB", "0.000200", "43.6", "0.500", "0", "1.00"]
    labels = re.findall(r'aria-label="([^"]+)"', page)
    assert len(labels) == 8 and len(set(labels)) == 4
    assert "without codecs" in page and "keys, bits" in page


def test_sentences_follow_the_numbers():
    found = dict(sentences(RUN))
    assert found["Memory"] == "4.40 MB after 5 chunks, 0.29 of the 15.0 MB without codecs."
    assert (
        found["Drift"].startswith("43.0 dB in the last chunk, least 43.0 dB in chunk 5.")
        or "in chunk" in found["Drift"]
    )
    assert "shape 0.900 (float 1.000)" in found["Drift"]
    assert found["Commit"] == "6.0% of the time; chunk 3 most, 20.0% of it."
    same = dataclasses.replace(RUN, mse=np.zeros((2, CHUNKS)), scores={}, reference_scores={})
    assert dict(sentences(same))["Drift"].startswith("None: latents are those of the float model")
    assert "no difference in any chunk" in render(same, "t", "c", {})


def test_decibels_are_of_the_spread_of_latents():
    assert decibels(RUN)[0, 2] == pytest.approx(10 * np.log10(4 / 1e-4)) and decibels(RUN)[0, 0] == 100


def test_the_numbers_are_json_and_the_page_is_written_whole(tmp_path):
    told = json.loads(json.dumps(cache_to_json(RUN), allow_nan=False))
    assert told["plain"][4] == 15_000_000 and len(told["psnr_by_chunk"]) == CHUNKS
    out = write_cache_report(RUN, tmp_path / "deep" / "c.html", "t", "c", {})
    assert out.read_text().startswith("<!doctype html>") and [f.name for f in out.parent.iterdir()] == ["c.html"]
