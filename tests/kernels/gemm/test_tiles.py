from dataclasses import replace

import pytest

from fxq.kernels.gemm.tiles import PROCESSORS, TABLE, TWO_SUMS, candidates, choose

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHAPES = [(1, 1536, 1536), (16, 64, 32), (70, 1536, 8960), (1560, 1536, 1536), (4680, 8960, 1536), (9360, 5120, 13824)]


@pytest.mark.parametrize("arch", sorted(PROCESSORS))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_a_choice_fits_the_architecture(shape, arch):
    tiles = choose(*shape, arch)
    assert tiles == choose(*shape, arch)
    assert tiles.shared_bytes <= SHARED_KIB[arch] * 1024
    assert tiles.block_k >= 64 and tiles.block_outlier >= 64
    assert any((t.block_m, t.block_n) == (tiles.block_m, tiles.block_n) for t in candidates(arch))


def test_few_rows_take_the_smallest_tile_and_many_a_large_one():
    assert choose(1, 1536, 1536, 80) == TABLE[-1]
    assert choose(4680, 8960, 1536, 80) in TABLE[:2]


def test_an_unknown_architecture_counts_as_the_next_older_one():
    assert choose(4680, 1536, 1536, 87) == choose(4680, 1536, 1536, 86)
    assert choose(4680, 1536, 1536, 75) == choose(4680, 1536, 1536, 80)


def test_a_narrow_product_takes_narrow_steps():
    assert choose(512, 512, 48, 90).block_k == 64


def test_a_kernel_that_spills_with_the_largest_tile_takes_a_smaller_one():
    assert choose(4680, 8960, 1536, 120) == choose(4680, 8960, 1536, 120, operation="gelu_tanh") == TABLE[0]
    assert choose(4680, 8960, 1536, 120, operation="gelu") in TABLE[1:]
    assert choose(4680, 8960, 1536, 121, operation="gelu") in TABLE[1:]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("arch", sorted(PROCESSORS))
def test_two_sums_take_smaller_tiles_than_one(arch, packed):
    dual, single = (
        choose(4680, 8960, 1536, arch, packed=packed, operation=f"per_token{suffix}") for suffix in ("_dual", "")
    )
    assert replace(dual, swapped=False) in TWO_SUMS and replace(single, swapped=False) == TABLE[0]
    assert all(t.block_m * t.block_n // (32 * t.warps) <= 32 for t in TWO_SUMS)


@pytest.mark.parametrize("arch", sorted(PROCESSORS))
def test_packed_weights_are_the_left_operand(arch):
    packed = choose(4680, 1536, 1536, arch, packed=True)
    assert packed.swapped and packed.constants()["SWAPPED"] is True
    assert packed == replace(choose(4680, 1536, 1536, arch), swapped=True)
