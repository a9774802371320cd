import functools
import math
import re
import sys

import pytest
import torch
from torch import nn

import fxq
from fxq.capture.trace import trace
from fxq.core.ir import QuantGraph, Stage
from fxq.core.pipeline import run_passes
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.passes import FuseAttention, FuseRotary
from fxq.passes.fusions.fold_permutations import apply_orders
from fxq.passes.fusions.merge_linears import MergeLinears
from fxq.passes.match.axis_groups import Axis, expand, factor
from fxq.passes.match.axis_rules import axis_groups
from tests.toys import recipe, rows, wan_rollout


def shuffled(size, seed=5):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 5), (1, 6), (7,)])
def test_an_order_made_of_factors_is_taken_apart(sizes):
    parts = [shuffled(size, seed) for seed, size in enumerate(sizes)]
    order = expand(parts)
    assert sorted(order.tolist()) == list(range(math.prod(sizes)))
    assert all(map(torch.equal, factor(order, sizes), parts))
    grid = torch.arange(len(order)).reshape(sizes)
    for dim, part in enumerate(parts):
        grid = grid.index_select(dim, part)
    assert torch.equal(grid.flatten(), order)


def test_an_order_that_mixes_factors_is_not_taken_apart():
    assert factor(torch.tensor([0, 2, 1, 3, 4, 5]), (2, 3)) is None


@functools.cache
def float_graph():
    rollout = wan_rollout(seeds=(1,))
    args, shapes = rollout.example_call()
    return trace(rollout.denoiser, args, None, shapes), args


def group_of(groups, name, dim):
    return groups.number[Axis(name, dim)]


def free_groups(groups):
    """Groups with stored tensors that no reshape makes of others, and the orders that follow from a random one."""
    made = {product.parent for product in groups.products}
    for i, size in enumerate(groups.sizes):
        if size not in (None, 1) and groups.stored(i) and i not in made:
            order = torch.arange(size).flip(0) if size < 4 else shuffled(size)
            orders = groups.reorder(i, order)
            if not isinstance(orders, str):
                yield i, orders


def flat(result):
    return [t for part in result for t in (part if isinstance(part, list) else [part])]


FREE = {
    "blocks.0.ffn.0.bias",
    "text_embedding.0.bias",
    "text_embedding.2.bias",
    "time_embedding.0.bias",
    "patch_embedding.bias",
}


@functools.cache
def quantized(bits):
    rollout = wan_rollout(seeds=(1,))
    args, _ = rollout.example_call()
    return fxq.quantize(rollout.denoiser, rollout, recipe(bits), progress=False), args


def test_every_free_order_of_the_float_model_leaves_its_output_unchanged():
    graph, args = float_graph()
    want = flat(graph.module(*args))
    found = set()
    for i, _ in free_groups(axis_groups(graph.module)):
        fork = graph.fork()
        groups = axis_groups(fork.module)
        orders = dict(free_groups(groups))[i]
        apply_orders(fork.module, groups, orders)
        found |= {name for name, _, _ in groups.stored(i)}
        for a, b in zip(want, flat(fork.module(*args)), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    assert found >= FREE
    assert {"head.head.weight", "time_projection.1.weight", "blocks.0.norm3.weight"} <= found


@pytest.mark.parametrize(
    "passes",
    [(), (MergeLinears,), (FuseAttention, FuseRotary, MergeLinears)],
    ids=["frozen", "merged", "merged after attention"],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_free_order_of_the_frozen_model_leaves_its_output_unchanged(bits, passes):
    module, args = quantized(bits)
    graph = QuantGraph(module, Stage.FROZEN).fork()
    run_passes(graph, [step() for step in passes])
    want, found = flat(graph.module(*args)), set()
    for i, _ in free_groups(axis_groups(graph.module)):
        fork = graph.fork()
        groups = axis_groups(fork.module)
        orders = dict(free_groups(groups))[i]
        apply_orders(fork.module, groups, orders)
        fork.module.recompile()
        names = {name for name, _, _ in groups.stored(i)}
        found |= names
        norm = "patch_embedding.bias" in names or "time_embedding.0.bias" in names
        for a, b in zip(want, flat(fork.module(*args)), strict=True):
            # Norms and float linears add in another order, which may move an integer by one.
            assert float((a - b).norm()) <= 1e-2 * float(a.norm()) if norm else torch.equal(a, b)
    assert {"blocks.0.ffn.0.offset", "text_embedding.0.offset", "text_embedding.2.offset"} <= found


def test_fused_attention_says_the_same_as_its_parts():
    module, _ = quantized(8)
    graph = run_passes(QuantGraph(module, Stage.FROZEN).fork(), (FuseAttention(), FuseRotary()))
    targets = {str(node.target) for node in graph.module.graph.nodes}
    assert {"fxq.attention.default", "fxq.rms_norm_rope.default"} <= targets
    for groups in (axis_groups(module), axis_groups(graph.module)):
        within = expand([torch.arange(2), torch.arange(32).flip(0)])
        for layer, reason in (
            ("self_attn.v", "prefix_v_0 is an input of the model"),
            ("self_attn.q", "depends on it|input"),
        ):
            found = groups.reorder(group_of(groups, f"blocks.0.{layer}.weight", 0), within)
            assert isinstance(found, str) and re.search(reason, found)
        found = groups.reorder(group_of(groups, "blocks.0.self_attn.v.weight", 0), shuffled(64))
        assert isinstance(found, str) and "into 2 parts that the order does not keep whole" in found


@pytest.mark.parametrize(
    ("name", "dim", "reason"),
    [
        ("blocks.0.self_attn.q.weight", 0, r"unflatten_\d+ splits it into 2 parts that the order does not keep whole"),
        ("blocks.0.cross_attn.v.weight", 0, r"unflatten_\d+ splits it into 2 parts that the order does not keep whole"),
        ("text_embedding.0.weight", 1, "context is an input of the model"),
        ("blocks.0.modulation", 1, r"unbind \(aten.unbind.int\) depends on it"),
        ("patch_embedding.weight", 1, r"conv3d \(aten.conv3d.default\) depends on it"),
        ("time_projection.1.weight", 0, r"unflatten splits it into 6 parts that the order does not keep whole"),
    ],
)
def test_an_order_that_cannot_change_says_why(name, dim, reason):
    groups = axis_groups(float_graph()[0].module)
    group = group_of(groups, name, dim)
    size = groups.sizes[group]
    assert size is not None
    found = groups.reorder(group, torch.arange(size).roll(1))
    assert isinstance(found, str) and re.fullmatch(reason, found)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("self_attn.q", "depends on it|is an input of the model|is a result of the model"),
        ("self_attn.k", "depends on it|is an input of the model|is a result of the model"),
        ("self_attn.v", "prefix_v_0 is an input of the model"),
        ("cross_attn.v", "cross_v_0 is an input of the model"),
    ],
)
def test_channels_within_heads_are_pinned_by_rotation_and_caches(layer, reason):
    groups = axis_groups(float_graph()[0].module)
    group = group_of(groups, f"blocks.0.{layer}.weight", 0)
    found = groups.reorder(group, expand([torch.arange(2), torch.arange(32).flip(0)]))
    assert isinstance(found, str) and re.search(reason, found)


class Heads(nn.Module):
    """Attention over 4 heads, values of 8 channels each, without a cache."""

    def __init__(self):
        super().__init__()
        self.v, self.o = nn.Linear(24, 32), nn.Linear(32, 5)

    def forward(self, x):
        q, v = (t.view(x.shape[0], -1, 4, t.shape[-1] // 4).transpose(1, 2) for t in (x, self.v(x)))
        y = torch.nn.functional.scaled_dot_product_attention(q, q, v)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (expand([torch.arange(4), shuffled(8)]), ""),
        (shuffled(32), "flatten splits it into 4 parts that the order does not keep whole"),
        (expand([shuffled(4), torch.arange(8)]), "x is an input of the model"),
    ],
    ids=["within heads", "any", "of heads"],
)
def test_an_order_within_heads_goes_through_attention(order, reason):
    model, x = Heads().eval(), rows(2, 6, 24)
    graph = trace(model, (x,))
    groups = axis_groups(graph.module)
    orders = groups.reorder(group_of(groups, "o.weight", 1), order)
    if reason:
        assert orders == reason
        return
    apply_orders(graph.module, groups, orders)
    assert not torch.equal(graph.module.v.weight, model.v.weight)
    torch.testing.assert_close(graph.module(x), model(x))


CASES = {
    "gelu": (torch.nn.functional.gelu, True),
    "layer norm": (lambda x: torch.nn.functional.layer_norm(x, (12,)), True),
    "rms norm": (lambda x: torch.nn.functional.rms_norm(x, (12,)), True),
    "softmax": (lambda x: x.softmax(-1), True),
    "mean kept": (lambda x: x - x.mean(-1, keepdim=True), True),
    "transposes": (lambda x: x.transpose(1, 2).permute(0, 2, 1).unsqueeze(1).squeeze(1).contiguous(), True),
    "whole slice": (lambda x: x[:, :, :] * 2, True),
    "cat of rows": (lambda x: torch.cat([x, x], 1), True),
    "view and back": (lambda x: x.view(x.shape[0], -1).view(x.shape) * 2, True),
    "cumsum": (lambda x: x.cumsum(-1), False),
    "flip": (lambda x: x.flip(-1), False),
    "half": (lambda x: torch.cat([x[..., :6], x[..., 6:]], -1), False),
    "chunk": (lambda x: torch.cat(x.chunk(2, -1)[::-1], -1), False),
    "roll": (lambda x: x.roll(1, -1), False),
    "written": (lambda x: x.clone().fill_(1) + x, False),
    "positions": (lambda x: x + torch.arange(12.0), False),
    "matmul": (lambda x: x @ torch.ones(12, 12), False),
}


@pytest.mark.parametrize(("between", "free"), CASES.values(), ids=CASES)
def test_what_lies_between_two_linears_decides(between, free):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(7, 12), nn.Linear(12, 5)

        def forward(self, x):
            return self.b(between(self.a(x)))

    model, x = Model().eval(), rows(3, 4, 7)
    graph = trace(model, (x,))
    groups = axis_groups(graph.module)
    orders = groups.reorder(group_of(groups, "a.weight", 0), shuffled(12))
    assert isinstance(orders, str) != free
    if not isinstance(orders, str):
        apply_orders(graph.module, groups, orders)
        assert not torch.equal(graph.module.a.weight, model.a.weight)
        torch.testing.assert_close(graph.module(x), model(x))


def test_a_value_that_is_returned_keeps_its_order():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(7, 12), nn.Linear(12, 5)

        def forward(self, x):
            h = self.a(x)
            return h, self.b(h)

    groups = axis_groups(trace(Model().eval(), (rows(3, 7),)).module)
    assert groups.reorder(group_of(groups, "a.weight", 0), shuffled(12)) == "linear is a result of the model"


def calls_of(work):
    """Calls of functions, in Python and C, that some work makes."""
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.sweep
def test_work_grows_with_the_number_of_blocks_and_not_with_its_square():
    graphs = {blocks: many_blocks(blocks) for blocks in (2, 6)}
    few, many = (calls_of(lambda g=graph: [*free_groups(axis_groups(g.module))]) for graph in graphs.values())
    assert many < 4 * few
    groups = axis_groups(graphs[6].module)
    assert len(groups.stored(group_of(groups, "blocks.5.ffn.0.weight", 0))) == 3


def many_blocks(count):
    config = CausalWanConfig(
        dim=64, ffn_dim=96, num_heads=2, num_layers=count, freq_dim=16, text_dim=32, text_len=5, in_dim=3, out_dim=3
    )
    rollout = wan_rollout(seeds=(1,), config=config)
    assert isinstance(rollout.denoiser, CausalWan)
    args, shapes = rollout.example_call()
    return trace(rollout.denoiser, args, None, shapes)
