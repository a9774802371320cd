import pytest

from tests.comparison.bundles.example import results


def test_the_median_and_the_worst_are_of_all_chunks_of_all_videos():
    a, b = results().rows
    assert (a.median, a.worst, a.worst_place) == (46.5, 31.25, (2, 2))
    assert (b.median, b.worst, b.worst_place) == (37.5, 35.0, (2, 3))


def test_the_time_of_a_chunk_is_not_moved_by_the_first_one():
    found = results()
    assert found.full.per_chunk == pytest.approx(0.5) and found.chunks == 3
