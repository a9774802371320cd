import dataclasses

import pytest
import torch

from fxq import numerics
from fxq.core.config import Scheme
from fxq.core.ir import LayerPlan
from fxq.parallel.layers import shard_column, shard_row
from fxq.parallel.plan import ParallelError
from fxq.passes.apply_methods import group_order

OUTPUTS, WIDTH = 11, 192
SCATTERED = tuple(range(1, 64, 2))
"""All 32 outliers in the first third of the channels, so that ranks have none or many."""
DENSE = tuple(range(96, 192))
"""The second of two ranks has outliers only."""


def layer(bits=8, outliers=(), symmetric=False, seed=0):
    """(plan, tensors, int8 weights, bias) of a layer with random integers."""
    random = torch.Generator().manual_seed(seed)
    scheme = Scheme(weight_bits=bits)
    plan = LayerPlan(layer="blocks.0.o", in_features=WIDTH, out_features=OUTPUTS, scheme=scheme, outliers=outliers)
    groups = 2 if outliers else 1
    low, high = numerics.integer_range(bits)
    codes = torch.randint(low, high + 1, (OUTPUTS, WIDTH), generator=random).to(torch.int8)
    scale = torch.rand(groups, OUTPUTS, generator=random) / 50 + 0.01
    x_scale = torch.rand(groups, generator=random) / 10 + 0.02
    zero = torch.zeros(groups) if symmetric else torch.tensor([-71, 40])[:groups]
    bias = torch.randn(OUTPUTS, generator=random)
    tensors = {
        "weight": numerics.pack_int4(codes) if bits == 4 else codes,
        "weight_scale": scale,
        "input_scale": x_scale,
        "input_zero_point": zero.to(torch.int32),
    }
    split = plan.split
    tensors["offset"] = numerics.fold_offset(bias, codes, scale, x_scale, tensors["input_zero_point"], split)
    if outliers:
        tensors["perm"] = group_order(plan).to(torch.int32)
    return plan, tensors


def integers(plan, tensors, x):
    """(int8 input, int8 weight) in stored order."""
    x = x[:, tensors["perm"]] if "perm" in tensors else x
    q = numerics.quantize_input(x, tensors["input_scale"], tensors["input_zero_point"], plan.split, 8)
    weight = tensors["weight"]
    return q, numerics.unpack_int4(weight) if weight.dtype == torch.uint8 else weight


def run(plan, tensors, x):
    q, weight = integers(plan, tensors, x)
    scales = tensors["weight_scale"], tensors["input_scale"], tensors["offset"]
    return numerics.dual_scale_matmul(q, weight, *scales, plan.split)


def inputs():
    return torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(5)) * 3


CASES = pytest.mark.parametrize(
    ("bits", "outliers"),
    [(8, ()), (4, ()), (8, SCATTERED), (4, SCATTERED), (4, DENSE)],
    ids=["W8", "W4", "W8 two scales", "W4 two scales", "W4 one rank all outliers"],
)


@CASES
@pytest.mark.parametrize("sizes", [(4, 4, 3), (1, 9, 1)])
def test_the_outputs_of_column_shards_are_those_of_the_layer_bit_by_bit(bits, outliers, sizes):
    plan, tensors = layer(bits, outliers)
    shards = [shard_column(plan, tensors, rank, 3, sizes) for rank in range(3)]
    assert [shard.plan.out_features for shard in shards] == list(sizes)
    got = torch.cat([run(shard.plan, shard.tensors, inputs()) for shard in shards], dim=1)
    torch.testing.assert_close(got, run(plan, tensors, inputs()), rtol=0, atol=0)


@CASES
@pytest.mark.parametrize("size", [2, 3, 4])
def test_row_shards_have_the_same_integers_and_sum_to_the_layer(bits, outliers, size):
    plan, tensors = layer(bits, outliers)
    x, width = inputs(), WIDTH // size
    total = 0
    q, w = (t[:, group_order(plan).argsort()] for t in integers(plan, tensors, x))
    for rank in range(size):
        shard = shard_row(plan, tensors, rank, size)
        mine = x[:, rank * width : (rank + 1) * width]
        assert shard.plan.in_features == width + shard.filled
        local_q, local_w = (t[:, group_order(shard.plan).argsort()] for t in integers(shard.plan, shard.tensors, mine))
        assert torch.equal(local_q[:, :width], q[:, rank * width : (rank + 1) * width])
        assert torch.equal(local_w[:, :width], w[:, rank * width : (rank + 1) * width])
        assert not local_w[:, width:].any()
        total = total + run(shard.plan, shard.tensors, mine)
    want = run(plan, tensors, x)
    assert float((total - want).abs().max() / want.abs().max()) < 1e-6


def test_only_packed_weights_are_filled_up_to_whole_blocks_in_both_groups():
    plan, tensors = layer(4, SCATTERED)
    shards = [shard_row(plan, tensors, rank, 4) for rank in range(4)]
    assert [(s.plan.split, len(s.plan.outliers), s.filled) for s in shards] == [
        (32, 32, 16),
        (64, 32, 48),
        (64, 0, 16),
        (64, 0, 16),
    ]
    assert all(shard_row(*layer(8, SCATTERED), rank, 4).filled == 0 for rank in range(4))


def test_a_rank_with_outliers_only_keeps_their_scale():
    plan, tensors = layer(8, DENSE)
    shard = shard_row(plan, tensors, 1, 2)
    assert shard.plan.outliers == () and "perm" not in shard.tensors
    assert torch.equal(shard.tensors["weight_scale"], tensors["weight_scale"][1:])
    assert torch.equal(shard.tensors["input_scale"], tensors["input_scale"][1:])


def test_the_bias_is_on_the_first_rank_only():
    plan, tensors = layer(8, SCATTERED, symmetric=True)
    offsets = [shard_row(plan, tensors, rank, 2).tensors["offset"] for rank in range(2)]
    assert torch.equal(offsets[0], tensors["offset"])
    assert not offsets[1].any()


def test_zero_points_are_folded_per_rank():
    plan, tensors = layer(8)
    plan_b, tensors_b = layer(8, symmetric=True)
    spread = shard_row(plan, tensors, 0, 2).tensors["offset"] - tensors_b["offset"]
    own = shard_row(plan, tensors, 1, 2).tensors["offset"]
    torch.testing.assert_close(spread + own, tensors["offset"] - tensors_b["offset"], rtol=1e-5, atol=1e-4)
    assert own.abs().max() > 0.1 and plan_b == plan


def test_layers_that_measure_their_input_at_run_time_have_no_stored_scale_to_split():
    plan, tensors = layer(8)
    stored = {name: tensors[name] for name in ("weight", "weight_scale", "offset")}
    for rank in range(2):
        shard = shard_row(plan, stored, rank, 2)
        assert set(shard.tensors) == set(stored)
        assert torch.equal(shard.tensors["offset"], tensors["offset"] * (rank == 0))


def test_shards_do_not_keep_the_layer_alive():
    plan, tensors = layer(8, SCATTERED)
    whole = {t.untyped_storage().data_ptr() for t in tensors.values()}
    for make in (shard_column, shard_row):
        shard = make(dataclasses.replace(plan), tensors, 0, 1)
        assert not whole & {t.untyped_storage().data_ptr() for t in shard.tensors.values()}


@pytest.mark.parametrize(
    ("make", "rank", "size", "sizes", "reason"),
    [
        (shard_column, 0, 2, None, "layer blocks.0.o, outputs: 11 channels cannot be split evenly over 2 ranks"),
        (shard_row, 0, 5, None, "layer blocks.0.o, inputs: 192 channels cannot be split evenly over 5 ranks"),
        (shard_column, 0, 2, (5, 5), r"sizes \[5, 5\], expected 2 positive numbers with sum 11"),
        (shard_row, 0, 2, (0, 192), r"sizes \[0, 192\], expected 2 positive numbers"),
        (shard_row, 2, 2, None, r"rank 2 of 2, expected 0..1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, rank, size, sizes, reason):
    with pytest.raises(ParallelError, match=reason):
        make(*layer(), rank, size, sizes)
