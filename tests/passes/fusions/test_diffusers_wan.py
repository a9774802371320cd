"""The transformer of diffusers, which has its own names, heads by ``unflatten`` and a rotation by strided writes."""

from collections import Counter

import pytest
import torch

import fxq
from fxq import kernels
from fxq.core.ir import QuantGraph, Stage
from fxq.core.pipeline import run_passes
from fxq.passes.fusions.fold_permutations import FoldPermutations
from fxq.passes.fusions.merge_linears import MergeLinears
from tests.toys import recipe

diffusers = pytest.importorskip("diffusers")

QUANTIZE, LINEAR = kernels.quantize_act.definition, kernels.dual_scale_linear.definition


def wan():
    """A tiny transformer whose second feed-forward linears have outlier channels."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        text_dim=32,
        freq_dim=16,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.ffn.net[2].weight[:, 3:90:9] *= 8
            block.attn1.to_q.weight[:, 5:50:7] *= 8
            block.attn1.to_out[0].weight[:, 1:60:8] *= 8
            block.norm2.bias += 0.1 * torch.randn(64)
    return model.requires_grad_(False)


def inputs(batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 3, 2, 4, 6, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, 32, generator=generator),
        "return_dict": False,
    }


@pytest.fixture(scope="module")
def quantized():
    return fxq.quantize(wan(), [inputs(), inputs(seed=2)], recipe(4), progress=False)


def count(module):
    return Counter(node.target for node in module.graph.nodes)


def test_every_linear_of_the_blocks_is_quantized(quantized):
    rows = {row.layer: row for row in fxq.summary(quantized).rows}
    for block in (0, 1):
        for name in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v", "ffn.net.0.proj", "ffn.net.2"):
            assert rows[f"blocks.{block}.{name}"].quantized
    model = wan()
    want, got = model(**inputs())[0], quantized(**inputs())[0]
    assert float((want - got).norm() / want.norm()) < 0.3


@pytest.mark.parametrize("passes", [(MergeLinears, FoldPermutations), (FoldPermutations, MergeLinears)], ids=str)
def test_merging_and_folding_keep_the_result(quantized, passes):
    graph = run_passes(QuantGraph(quantized, Stage.FROZEN).fork(), [step() for step in passes])
    before, after = count(quantized), count(graph.module)
    assert before[LINEAR] - after[LINEAR] == 2 * 3, "q, k, v become one and text k, v become one in both blocks"
    assert after[QUANTIZE] < before[QUANTIZE]
    for call in (inputs(seed=3), inputs(seed=4)):
        assert torch.equal(quantized(**call)[0], graph.module(**call)[0])
    assert graph.plans == QuantGraph(quantized).plans


def test_remarks_say_what_happened(quantized):
    graph = run_passes(QuantGraph(quantized, Stage.FROZEN).fork(), (MergeLinears(), FoldPermutations()))
    remarks = graph.remarks
    assert remarks["blocks.1.attn1.to_v"][0] == "one GEMM with blocks.1.attn1.to_q, blocks.1.attn1.to_k"
    assert remarks["blocks.1.attn2.to_k"][0] == "one GEMM with blocks.1.attn2.to_v"
    assert remarks["blocks.1.ffn.net.2"] == ["channel order folded into blocks.1.ffn.net.0.proj"]
    assert "the order of its input is" in remarks["blocks.1.attn1.to_q"][1]
    assert "that the order does not keep whole" in remarks["blocks.1.attn1.to_out.0"][0]
