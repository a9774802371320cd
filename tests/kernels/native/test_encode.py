"""Native kernels that encode: the same to the bit for every instruction set, and as torch has it."""

import ctypes

import pytest
import torch

from fxq import cpu
from fxq.cache.codecs import packing
from fxq.kernels import native
from fxq.kernels.native import build, encode
from fxq.kernels.native.cache import cache_folder
from tests.features import needs

pytestmark = needs("native")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def each(monkeypatch):
    """Calls a function with the kernels of every instruction set that this CPU has."""

    def run(call):
        found = []
        for one in build.SETS:
            if not cpu.missing(one.needs):
                library = ctypes.CDLL(str(build.build(build.compiler(), cache_folder(), one)))
                monkeypatch.setattr(native, "library", lambda library=library: (library, ""))
                found.append(call())
        return found

    return run


@pytest.mark.parametrize(("count", "width"), [(5, 3), (100, 72)])
def test_clusters_are_the_same_bits_for_every_instruction_set(count, width, each):
    x, centroids = normal(2, 101, width, seed=1), normal(2, count, width, seed=2)
    centroids[:, 2] = 1e3  # no token's
    # Tokens half way between two centroids: the order of a sum decides.
    x[:, :50] = (centroids[:, :1] + centroids[:, 1:2]) / 2 + 1e-7 * x[:, :50]

    def clustered():
        names, rest = encode.nearest_and_rest(x, centroids)
        assert torch.equal(names, encode.nearest(x, centroids))
        return names, rest, encode.means(x, names, centroids)

    first, *others = each(clustered)
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))
    names, rest, means = first
    for group in range(2):
        assert torch.equal(rest[group], x[group] - centroids[group, names[group]])
        assert torch.equal(means[group, 2], centroids[group, 2])
        for name in names[group].unique():
            assert torch.allclose(means[group, name], x[group, names[group] == name].mean(0), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("size", "channels"), [(64, 32), (30, 5), (9, 9), (34, 34)])
def test_codes_are_those_of_torch(size, channels, bits, each):
    x = normal(7, 3, size, seed=1)
    x[0, 1] = 0
    blocks = x.unflatten(-1, (-1, channels))
    ranges = blocks.aminmax(dim=-1)
    scale = ((ranges.max - ranges.min) / (2**bits - 1)).clamp_min(1e-3)
    half = 2 ** (bits - 1) - 1
    for zero, low, high in ((ranges.min, 0, 2**bits - 1), (None, -half, half)):
        steps = (blocks if zero is None else blocks - zero.unsqueeze(-1)) / scale.unsqueeze(-1)
        codes = steps.round().clamp(low, high) - low
        want = packing.pack(codes.flatten(-2), bits)
        for got in each(lambda zero=zero: encode.block_codes(x, scale, zero, bits)):
            assert torch.equal(got, want)
    for low, high in each(lambda: encode.block_ranges(x, channels)):
        assert torch.equal(low, ranges.min) and torch.equal(high, ranges.max)
