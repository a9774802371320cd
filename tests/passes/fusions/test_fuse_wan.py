"""All fusions on a small causal Wan: what is fused, what is left, and that it computes the same."""

import dataclasses
import functools

import pytest
import torch
from torch.utils import _pytree as pytree

import fxq
from fxq.core.graph import graph_text
from fxq.core.ir import QuantGraph, Stage
from fxq.core.pipeline import run_passes
from fxq.passes.fusions.fold_permutations import FoldPermutations
from fxq.passes.fusions.fuse_activation_quantize import FuseActivationQuantize
from fxq.passes.fusions.fuse_attention import FuseAttention
from fxq.passes.fusions.fuse_norm_quantize import FuseNormQuantize
from fxq.passes.fusions.fuse_residual import FuseResidual
from fxq.passes.fusions.fuse_rotary import FuseRotary
from fxq.passes.fusions.merge_linears import MergeLinears
from fxq.passes.fusions.real_rope import RealRope
from tests.graphs import golden, outline
from tests.passes.fusions.fusing import count
from tests.toys import WAN, recipe, wan_rollout

PASSES = (RealRope(), FuseAttention(), FuseRotary(), FuseNormQuantize(), FuseActivationQuantize(), FuseResidual())
BLOCKS = 2


@functools.cache
def quantized(dtype, dual_scale, blocks):
    """(rollout, quantized denoiser, fused graph)."""
    rollout = wan_rollout(config=dataclasses.replace(WAN, num_layers=blocks))
    rollout.denoiser.to(dtype)
    q = fxq.quantize(rollout.denoiser, rollout, recipe(dual_scale=dual_scale), progress=False)
    return rollout, q, run_passes(QuantGraph(q, Stage.FROZEN).fork(), PASSES)


def sqnr(got, want):
    """Signal to noise in dB of lists of tensors taken together; empty ones count nothing."""
    got, want = (torch.cat([t.double().flatten() for t in pytree.tree_leaves(tree)]) for tree in (got, want))
    return float(10 * torch.log10(want.square().sum() / (got - want).square().sum().clamp(min=1e-30)))


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="float32", marks=pytest.mark.sweep), pytest.param(torch.bfloat16, id="bfloat16")],
)
def test_every_node_of_a_block_is_fused(dtype):
    _, _, graph = quantized(dtype, False, BLOCKS)
    found = {name: count(graph, f"fxq.{name}") for name in ("norm_quantize", "rms_norm_rope", "attention")}
    # One norm before self q, k and v, which are not merged here, one before cross q, one before the FFN.
    assert found == {"norm_quantize": 5 * BLOCKS, "rms_norm_rope": 4 * BLOCKS, "attention": 2 * BLOCKS}
    assert count(graph, "fxq.dual_scale_linear_quantize") == BLOCKS + 1  # the text embedding has a GELU, too
    assert count(graph, "fxq.dual_scale_linear_add") == 3 * BLOCKS
    # Left: self q, k, v, cross q, k, v, whose results are no sums, and the second text embedding.
    assert count(graph, "fxq.dual_scale_linear") == 6 * BLOCKS + 1
    assert count(graph, "aten.layer_norm") == 1  # of the head, which the recipe keeps
    assert count(graph, "aten.rsqrt") == count(graph, "aten.stack") == count(graph, "aten.gelu") == 0
    assert count(graph, "aten.cat") == 2 * BLOCKS + 1  # text keys and values are results; the timestep's sinusoid


def test_every_layer_keeps_its_plan_and_says_what_became_of_it():
    _, q, graph = quantized(torch.float32, False, BLOCKS)
    assert graph.plans == QuantGraph(q, Stage.FROZEN).plans
    said = graph.remarks
    assert said["blocks.1.self_attn.q"] == ["norm and rotation after it in one pass", "quantize fused into its norm"]
    assert said["blocks.1.cross_attn.q"] == ["norm after it in one pass", "quantize fused into its norm"]
    assert said["blocks.1.self_attn.o"] == [
        "attention to 2 pieces of keys and values",
        "gate and residual in its epilogue",
    ]
    assert said["blocks.1.cross_attn.o"] == ["attention fused", "residual in its epilogue"]
    assert said["blocks.1.ffn.0"] == ["quantize fused into its norm", "gelu and the next quantize in its epilogue"]
    assert said["blocks.1.ffn.2"] == ["gate and residual in its epilogue"]
    left = [layer for layer, texts in said.items() if any("not" in text.split() for text in texts)]
    assert left == ["text_embedding.2"]  # its result is quantized once per block


@pytest.mark.parametrize("dual_scale", [False, True], ids=["one scale", "two scales"])
def test_a_rollout_computes_the_same(dual_scale):
    rollout, q, graph = quantized(torch.float32, dual_scale, 1)
    calls = []

    def both(*args):
        want, got = q(*args), graph.module(*args)
        assert [(t.dtype, t.shape) for t in pytree.tree_leaves(got)] == [
            (t.dtype, t.shape) for t in pytree.tree_leaves(want)
        ]
        calls.append((args[5][0].shape[1], sqnr(got, want), sqnr(got[0], want[0])))
        return want

    with rollout.using(both):
        rollout.rollout(*rollout.batches[0])
    assert {prefix for prefix, _, _ in calls} == {0, 12, 24} and len(calls) == 9
    assert min(all_ for _, all_, _ in calls) > 50 and min(prediction for _, _, prediction in calls) > 50


def test_integers_that_flip_at_a_boundary_keep_the_mean_error_small():
    rollout, q, graph = quantized(torch.float32, False, BLOCKS)
    args, _ = rollout.example_call()
    with torch.no_grad():
        want, got = q(*args)[0], graph.module(*args)[0]
    assert float((got - want).abs().mean() / want.abs().mean()) <= 1e-4


def test_bfloat16_is_not_further_from_the_float_model_than_before():
    rollout, q, graph = quantized(torch.bfloat16, False, BLOCKS)
    args, _ = rollout.example_call()
    model = rollout.denoiser
    double = type(model)(model.config).double()
    double.load_state_dict(model.state_dict())
    widened = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.dtype == torch.bfloat16 else t, args)
    with torch.no_grad():
        exact, before, after = double(*widened)[0], q(*args)[0].double(), graph.module(*args)[0].double()
    assert after.isfinite().all()
    assert float((after - exact).norm()) <= 1.1 * float((before - exact).norm())


@pytest.mark.parametrize("stage", ["frozen", "fused"])
def test_the_graph_of_a_block_reads_as_the_golden_file(stage):
    _, q, graph = quantized(torch.float32, False, 1)
    module = q if stage == "frozen" else graph.module
    golden(f"wan_block_{stage}", outline(module, "blocks.0"))


def test_fusing_again_changes_nothing():
    _, _, graph = quantized(torch.float32, False, BLOCKS)
    again = run_passes(graph.fork(), PASSES)
    assert graph_text(again.module) == graph_text(graph.module)
    assert {name: touched for name, touched, _ in again.log[len(PASSES) :]} == {step.name: 0 for step in PASSES}


@pytest.mark.parametrize("dual_scale", [False, True], ids=["one scale", "two scales"])
def test_merged_linears_take_one_norm_and_quantize(dual_scale):
    merge, fold = MergeLinears(), FoldPermutations()
    rollout, q, _ = quantized(torch.float32, dual_scale, 1)
    graph = QuantGraph(q, Stage.FROZEN).fork()
    run_passes(graph, (*PASSES[:3], merge, fold, *PASSES[3:]))
    args, _ = rollout.example_call()
    with torch.no_grad():
        assert sqnr(graph.module(*args), q(*args)) > 50
    assert graph.plans == QuantGraph(q, Stage.FROZEN).plans
    norms = {str(node.args[0]) for node in graph.module.graph.nodes if "norm_quantize" in str(node.target)}
    assert len(norms) == count(graph, "fxq.norm_quantize") == 3
    assert count(graph, "fxq.dual_scale_linear_add") == 3
    assert count(graph, "fxq.dual_scale_linear_quantize") == 3
