"""The fusions on diffusers' Wan transformer: everything that can be fused is, and the rest has its reason."""

import functools

import pytest
import torch

import fxq
from fxq.core.ir import QuantGraph, Stage
from fxq.core.pipeline import run_passes
from tests.passes.fusions.fusing import count
from tests.passes.fusions.test_fuse_wan import PASSES, sqnr
from tests.toys import recipe

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow

BLOCKS = 2
CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 96,
    "num_layers": BLOCKS,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def call(dtype, per_token, batch=2):
    """Arguments of a call; Wan 2.2 has a timestep per token."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 3, 4, 6, generator=random).to(dtype)
    text = torch.randn(batch, 7, 32, generator=random).to(dtype)
    t = torch.arange(batch * 18).reshape(batch, 18) * 20 if per_token else torch.arange(batch) * 300 + 100
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": text, "return_dict": False}


_SWEEP = pytest.mark.sweep
SCALAR = [pytest.param(False, id="timestep"), pytest.param(True, id="timestep per token", marks=_SWEEP)]
VECTOR = [pytest.param(False, id="timestep", marks=_SWEEP), pytest.param(True, id="timestep per token")]


@functools.cache
def quantized(dtype, per_token):
    """(model, quantized, fused graph)."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**CONFIG).eval().requires_grad_(False).to(dtype)
    q = fxq.quantize(model, [call(dtype, per_token)], recipe(dual_scale=False), progress=False)
    return model, q, run_passes(QuantGraph(q, Stage.FROZEN).fork(), PASSES)


@pytest.mark.parametrize(
    ("dtype", "per_token"),
    [
        pytest.param(torch.float32, False, id="float32-timestep", marks=_SWEEP),
        pytest.param(torch.bfloat16, True, id="bfloat16-timestep per token"),
        pytest.param(torch.float32, True, id="float32-timestep per token", marks=_SWEEP),
        pytest.param(torch.bfloat16, False, id="bfloat16-timestep", marks=_SWEEP),
    ],
)
def test_every_node_of_a_block_is_fused(dtype, per_token):
    _, _, graph = quantized(dtype, per_token)
    names = ("norm_quantize", "rms_norm_rope", "attention", "dual_scale_linear_quantize", "dual_scale_linear_add")
    assert [count(graph, f"fxq.{name}") for name in names] == [
        5 * BLOCKS,
        4 * BLOCKS,
        2 * BLOCKS,
        BLOCKS + 1,
        3 * BLOCKS,
    ]
    for name in ("rms_norm", "copy_", "empty_like", "scaled_dot_product_attention", "gelu"):
        assert count(graph, f"aten.{name}") == 0, name
    assert count(graph, "aten.layer_norm") == 1  # before the projection to pixels, which the recipe keeps


def test_what_is_left_has_its_reason():
    _, _, graph = quantized(torch.float32, False)
    left = {layer: texts for layer, texts in graph.remarks.items() if any("not" in text.split() for text in texts)}
    assert list(left) == ["condition_embedder.text_embedder.linear_2"]
    (text,) = left["condition_embedder.text_embedder.linear_2"]
    assert text.startswith("the next quantize not in its epilogue: its result is read by quantize_act_default")


@pytest.mark.parametrize("per_token", SCALAR)
def test_the_result_is_the_same(per_token):
    _, q, graph = quantized(torch.float32, per_token)
    arguments = call(torch.float32, per_token)
    with torch.no_grad():
        want, got = q(**arguments)[0], graph.module(**arguments)[0]
    assert got.dtype == want.dtype and sqnr(got, want) > 50
    assert float((got - want).abs().mean() / want.abs().mean()) <= 1e-4


@pytest.mark.parametrize("per_token", VECTOR)
def test_bfloat16_is_not_further_from_the_float_model_than_before(per_token):
    model, q, graph = quantized(torch.bfloat16, per_token)
    exact_model = diffusers.WanTransformer3DModel(**CONFIG).eval()
    exact_model.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    arguments = call(torch.bfloat16, per_token)
    exact_arguments = {n: t.float() if getattr(t, "dtype", 0) == torch.bfloat16 else t for n, t in arguments.items()}
    with torch.no_grad():
        before, after = q(**arguments)[0], graph.module(**arguments)[0]
        exact = exact_model(**exact_arguments)[0].double()
    assert after.dtype == before.dtype
    assert float((after.double() - exact).norm()) <= 1.1 * float((before.double() - exact).norm())
