import dataclasses
import math

import numpy as np
import pytest

from fxq.comparison.measure import Seconds
from fxq.comparison.results import base_of, means_of, pool, reliability_of, rows_of
from tests.report.example import variant


def made(method, bits="W4A8", error=0.2, seed=0):
    return variant(method, bits, error, 4, np.random.default_rng(seed))


def by_seed(*variants):
    return {i: (v, Seconds(statistics=float(i), sensitivity=0.0, methods=2.0)) for i, v in enumerate(variants)}


def test_pooled_rows_have_the_videos_of_all_seeds_and_mean_scores():
    a, b = made("q", seed=1), dataclasses.replace(made("q", seed=2), scores={"shape": 0.5}, seconds=10.0)
    both = pool([dataclasses.replace(a, scores={"shape": 1.0}, seconds=20.0), b])
    assert both.psnr.tolist() == [*a.psnr, *b.psnr] and both.chunk_mse.shape == (8, 7)
    assert (both.scores, both.seconds, both.bytes) == ({"shape": 0.75}, 15.0, a.bytes)


def test_the_base_is_of_the_same_width_or_the_only_row_it_has():
    rows = [made("a", "W8A8"), made("a", "W4A8"), made("b", "W4A8"), made("c", "MIXED")]
    assert base_of(rows[2], "a", rows) is rows[1]
    assert base_of(rows[3], "a", rows) is None
    assert base_of(rows[1], "c", rows) is rows[3]


def test_rows_say_what_they_are_against_and_how_long_they_took():
    base, better = by_seed(made("a", seed=1), made("a", seed=2)), by_seed(made("b", seed=1), made("b", seed=2))
    wide = by_seed(made("a", "W8A8", seed=1), made("a", "W8A8", seed=2))
    mixed = by_seed(made("c", "MIXED", seed=1), made("c", "MIXED", seed=2))
    rows = rows_of([base, better, mixed, wide], "a")
    assert rows[0].paired["teacher_forced"].ratio == 1
    alike = rows[1].paired["latent_mse"]
    assert alike.ratio == pytest.approx(1) and alike.videos == 8
    assert rows[2].paired == {}
    assert rows[1].seconds == Seconds(statistics=0.5, sensitivity=0.0, methods=2.0) and rows[1].seconds.total == 2.5
    chunks = rows[0].variant.forced_chunks.mean(0)
    assert rows[0].forced_by_chunk == chunks.tolist() and rows[0].worst_chunk == int(chunks.argmax()) + 1


def test_reliability_has_every_metric_and_reads_its_direction():
    errors = {"W8A8": 0.02, "W4A8": 0.2}
    rows = rows_of([by_seed(made("a", b, e, 1), made("a", b, 2 * e, 2)) for b, e in errors.items()], "a")
    found = {r.metric: r for r in reliability_of(rows, {"shape": 1.0})}
    assert list(found) == ["teacher_forced", "latent_mse", "psnr", "ssim", "shape"]
    assert all(found[name].boa == 1 for name in ("teacher_forced", "latent_mse", "psnr", "ssim"))
    assert found["shape"].boa == 0 and found["shape"].cv == pytest.approx(0)
    means = [means_of(row.variant)["latent_mse"] for row in rows]
    assert found["latent_mse"].cv == pytest.approx(np.std(means) / np.mean(means))
    assert found["latent_mse"].between_seeds > 0.5
    one_seed = rows_of([by_seed(made("a"))], "a")
    assert math.isnan(reliability_of(one_seed, {})[0].between_seeds)
