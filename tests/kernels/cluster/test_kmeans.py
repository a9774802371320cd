"""Nearest centroids and means of clusters: right, the same beside others, refused by name; Triton is used on a GPU."""

from contextlib import nullcontext

import pytest
import torch

from fxq.kernels.cluster import kmeans
from tests.features import demand, needs

GROUPS, TOKENS, COUNT, WIDTH = 3, 50, 6, 20


@pytest.fixture(params=["native", "torch"], autouse=True)
def implementation(request, monkeypatch):
    """The two of a CPU; torch compares tokens in several blocks."""
    if request.param == "native":
        demand("native")
    else:
        monkeypatch.setattr(kmeans.native, "ready", lambda: False)
        monkeypatch.setattr(kmeans, "BLOCK", 16)
    assert kmeans.used("cpu") == request.param
    return request.param


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    return normal(GROUPS, TOKENS, WIDTH, seed=1), normal(GROUPS, COUNT, WIDTH, seed=2)


def test_the_nearest_centroid_is_at_the_least_distance(problem):
    x, centroids = problem
    assert torch.equal(kmeans.nearest(x, centroids), torch.cdist(x, centroids).argmin(-1))


@pytest.mark.parametrize(("count", "width"), [(1, 1), (33, 7), (70, 128), (256, 20)])
def test_any_number_of_centroids_and_channels(count, width):
    x, centroids = normal(2, 113, width, seed=1), normal(2, count, width, seed=2)
    assert torch.equal(kmeans.nearest(x, centroids), torch.cdist(x.double(), centroids.double()).argmin(-1))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(kmeans.nearest(strided, centroids), kmeans.nearest(x, centroids))


def test_the_first_of_two_that_are_as_near_is_taken(problem):
    x, centroids = problem
    twice = torch.cat((centroids, centroids, centroids, centroids, centroids, centroids, centroids), 1)
    assert int(kmeans.nearest(x, twice).max()) < COUNT


def test_what_the_nearest_centroid_leaves_is_exact(problem):
    x, centroids = problem
    names, rest = kmeans.named(x, centroids)
    assert torch.equal(names, kmeans.nearest(x, centroids))
    assert all(torch.equal(rest[g], x[g] - centroids[g, names[g]]) for g in range(GROUPS))


@needs("native")
def test_threads_do_not_change_the_result():
    x, centroids, before = normal(3, 900, 64, seed=1), normal(3, 40, 64, seed=2), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            names = kmeans.nearest(x, centroids)
            found.append((names, kmeans.means(x, names, centroids)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_means_are_those_of_the_tokens_and_an_empty_cluster_keeps_its_centroid(problem):
    x, centroids = problem
    centroids[:, 2] = 1e3
    names = kmeans.nearest(x, centroids)
    got = kmeans.means(x, names, centroids)
    for group in range(GROUPS):
        assert torch.equal(got[group, 2], centroids[group, 2])
        for c in names[group].unique():
            own = x[group, names[group] == c]
            assert torch.allclose(got[group, c], own.mean(0), atol=1e-6)


def test_a_group_is_the_same_bit_for_bit_beside_others(problem):
    x, centroids = problem
    names = kmeans.nearest(x, centroids)
    alone = kmeans.nearest(x[1:2], centroids[1:2])
    assert torch.equal(alone[0], names[1])
    together = kmeans.means(x, names, centroids)
    assert torch.equal(kmeans.means(x[1:2], alone, centroids[1:2])[0], together[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c: (x.double(), c), "x is torch.float64"),
        (lambda x, c: (x, c[0]), r"centroids is torch.float32 \(6, 20\)"),
        (lambda x, c: (x, c[:2]), "expected the same groups and width"),
        (lambda x, c: (x, c[:, :0]), "expected the same groups and width"),
    ],
)
def test_what_does_not_fit_is_refused(problem, change, message):
    with pytest.raises(ValueError, match=message):
        kmeans.nearest(*change(*problem))


def test_names_of_another_shape_are_refused(problem):
    x, centroids = problem
    with pytest.raises(ValueError, match=r"names are torch\.int32"):
        kmeans.means(x, torch.zeros(GROUPS, TOKENS, dtype=torch.int32), centroids)


def test_a_gpu_takes_the_kernels(problem, monkeypatch):
    x, centroids = problem
    names = kmeans.nearest(x, centroids)
    monkeypatch.setattr(kmeans, "used", lambda device: "triton")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(kmeans.cluster_triton, "nearest", lambda *given: ("nearest", *given))
    monkeypatch.setattr(kmeans.cluster_triton, "means", lambda *given: ("means", *given))
    assert kmeans.nearest(x, centroids) == ("nearest", x, centroids)
    monkeypatch.setattr(kmeans.cluster_triton, "nearest", lambda *given: names)
    assert torch.equal(kmeans.named(x, centroids)[0], names)
    what, _, order, sizes, _ = kmeans.means(x, names, centroids)
    assert what == "means" and int(sizes.sum()) == len(order) == GROUPS * TOKENS
