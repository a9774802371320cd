"""fxq.optimize: the same function in fewer passes, every layer accounted for."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import fxq
from benchmarks.live_bytes import LiveBytes
from fxq import kernels
from fxq.calibration.rollout import Draws
from fxq.core.facts import Facts
from fxq.core.ir import QuantGraph, get_tensor
from fxq.core.pipeline import PassError
from fxq.core.summary import Summary
from fxq.kernels import native
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout
from fxq.passes import FUSIONS, FloatWhereFaster
from fxq.passes.measured import float_where_faster
from fxq.planning import memory
from fxq.planning.workloads import Workload
from tests.features import needs
from tests.toys import recipe, rows, toy, wan_rollout

CONFIG = CausalWanConfig(
    dim=96, ffn_dim=192, num_heads=3, num_layers=2, freq_dim=16, text_dim=32, text_len=5, in_dim=3, out_dim=3
)


def rollout_in(dtype):
    rollout = wan_rollout(config=CONFIG)
    for block in rollout.model.blocks:
        for layer in (block.self_attn.q, block.self_attn.k, block.self_attn.o, block.ffn[0], block.ffn[2]):
            layer.weight[:, 5:69:2] *= 6
    rollout.model.to(dtype)
    batches = [({"prompt_embeds": c["prompt_embeds"].to(dtype)}, draws) for c, draws in rollout.batches]
    return SelfForcingRollout(rollout.model, batches, rollout.sampler)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def case(request):
    rollout = rollout_in(request.param)
    q = fxq.quantize(rollout.model, rollout, recipe(8))
    return rollout.model, q, fxq.optimize(q), request.param


def call(dtype, batch=2, prefix=6, text=4, seed=0):
    """One call of a Wan-shaped denoiser."""
    g = torch.Generator().manual_seed(seed)
    shape = (CONFIG.num_heads, CONFIG.head_dim)

    def normal(*size):
        return torch.randn(*size, generator=g).to(dtype)

    def cache(length):
        return [normal(batch, length, *shape) for _ in range(CONFIG.num_layers)]

    angle = torch.rand(12, CONFIG.head_dim // 2, generator=g) * 6
    known = 0 if text else 5
    return (
        normal(batch, 2, 3, 4, 6),
        torch.full((batch, 2), 500.0),
        normal(batch, text, CONFIG.text_dim),
        *(cache(known), cache(known), cache(prefix), cache(prefix)),
        angle.cos(),
        angle.sin(),
    )


def leaves(output):
    return torch.cat([t.double().flatten() for t in torch.utils._pytree.tree_leaves(output)])


def error(got, want):
    return float((leaves(got) - leaves(want)).norm() / leaves(want).norm())


@pytest.mark.parametrize(
    "sizes", [{}, {"prefix": 0}, {"batch": 1, "prefix": 31}, {"text": 0, "prefix": 12}], ids=lambda s: str(s)
)
def test_the_optimized_module_computes_what_the_frozen_one_does(case, sizes):
    model, q, optimized, dtype = case
    arguments = call(dtype, **sizes)
    exact, frozen, fast = model(*arguments), q(*arguments), optimized(*arguments)
    if dtype == torch.float32:
        assert error(fast, frozen) < 3e-3  # integers on a rounding boundary may fall to the other side
    assert error(fast, exact) < 1.15 * error(frozen, exact) + 1e-3


def targets(module):
    return [
        str(n.target).removeprefix("fxq.").removesuffix(".default")
        for n in module.graph.nodes
        if "fxq." in str(n.target)
    ]


def test_every_block_is_fused_to_the_end(case):
    found = targets(case[2])
    blocks = CONFIG.num_layers
    assert found.count("norm_quantize") == 3 * blocks
    assert found.count("attention") == 2 * blocks
    assert found.count("rms_norm_rope") == 4 * blocks
    assert found.count("dual_scale_linear_add") == 3 * blocks
    # ffn.0 of each block; the text embedding, whose result all blocks' keys and values read as the same integers
    assert found.count("dual_scale_linear_quantize") == blocks + 2
    # of each block q/k/v, the cross q, and the cross k/v
    assert found.count("dual_scale_linear") == 3 * blocks
    # before o and cross o of each block, and the prompt
    assert found.count("quantize_act") == 2 * blocks + 1


def test_no_layer_is_lost_and_each_says_what_became_of_it(case):
    _, q, optimized, _ = case
    before, after = fxq.summary(q), fxq.summary(optimized)
    assert {r.layer for r in before.rows} == {r.layer for r in after.rows}
    assert [r.bits for r in sorted(before.rows, key=lambda r: r.layer)] == [
        r.bits for r in sorted(after.rows, key=lambda r: r.layer)
    ]
    assert all(r.remarks for r in after.quantized) and not any(r.remarks for r in before.rows)
    # Panels of 64 outputs round these narrow layers up; without them merged layers share what they have in common.
    low, high = (before.ratio, 0.75) if native.ready() else (0.98 * before.ratio, before.ratio)
    assert low < after.ratio < high


@needs("native")
def test_native_kernels_run_every_quantized_layer(case):
    assert {row.kernel for row in fxq.summary(case[2]).quantized} == {native.name()}


def test_the_module_it_came_from_is_unchanged(case):
    _, q, _, dtype = case
    arguments = call(dtype)
    before, names = q(*arguments), dict(q.named_buffers())
    fxq.optimize(q)
    assert torch.equal(leaves(before), leaves(q(*arguments)))
    assert dict(q.named_buffers()).keys() == names.keys()


def test_without_native_kernels_weights_stay_and_the_report_says_why(monkeypatch):
    monkeypatch.setattr(native, "ready", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "native kernels are for another machine")
    q = fxq.quantize(toy(), [rows(9, 96)], recipe(8))
    optimized = fxq.optimize(q)
    assert all("native kernels are for another machine" in row.remarks for row in fxq.summary(optimized).quantized)
    assert all(row.kernel == kernels.gemm.op.ON_CPU for row in fxq.summary(optimized).quantized)
    x = rows(5, 96, seed=4)
    assert torch.allclose(optimized(x), q(x), atol=1e-4)


def test_every_layer_of_a_joint_product_says_why_the_native_kernel_is_not_its(case, monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: "native kernels are for another machine")
    made = fxq.summary(fxq.optimize(case[1]))
    joint = [row for row in made.quantized if any(text.startswith("one GEMM with") for text in row.remarks)]
    assert len(joint) >= 5 * CONFIG.num_layers  # q, k, v and the cross k, v
    assert all("native kernels are for another machine" in row.remarks for row in made.quantized)
    assert set(made.facts["remarks"]) <= {row.layer for row in made.rows}


def test_what_is_said_of_modules_without_a_layer_stands_below_the_rows():
    said = {f"blocks.{i}.rope": ["complex rotation in real float32"] * 2 for i in range(5)}
    made = Summary((), {}, said | {"blocks.0.attn": ["attention fused"]})
    text = " ".join(str(made).split())
    assert "complex rotation in real float32: blocks.0.rope, blocks.1.rope, blocks.2.rope and 2 more" in text
    assert "blocks.0.attn: attention fused" in text


@needs("native")
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_any_width_are_laid_out_for_the_native_kernel(bits):
    q = fxq.quantize(toy(), [rows(9, 96)], recipe(bits))
    optimized = fxq.optimize(q)
    layouts = {
        get_tensor(optimized, n).ndim for n, _ in optimized.named_buffers() if n.endswith(".weight") and "blocks" in n
    }
    assert layouts == {4}
    x = rows(5, 96, seed=4)
    assert torch.allclose(optimized(x), q(x), atol=1e-4)


def test_a_float16_model_is_not_called_native():
    x = rows(9, 96).half()
    q = fxq.quantize(toy().half(), [x], recipe(8))
    optimized = fxq.optimize(q)
    down = next(row for row in fxq.summary(optimized).quantized if row.layer == "blocks.0.down")
    assert down.kernel == kernels.gemm.op.ON_CPU
    assert not native.ready() or any("not float16" in remark for remark in down.remarks)
    assert torch.allclose(optimized(x).float(), q(x).float(), atol=2e-2)


def test_optimizing_twice_and_foreign_modules_are_refused():
    q = fxq.quantize(toy(), [rows(9, 96)], recipe(8))
    with pytest.raises(PassError, match="optimized already; optimize the module it was made from"):
        fxq.optimize(fxq.optimize(q))
    with pytest.raises(ValueError, match=r"not made by fxq\.quantize"):
        fxq.optimize(torch.fx.symbolic_trace(torch.nn.Linear(3, 4)))


def test_an_optimized_module_refuses_other_sizes_and_is_not_saved(tmp_path):
    optimized = fxq.optimize(fxq.quantize(toy(), [rows(9, 96)], recipe(8)))
    with pytest.raises(ValueError, match="captured for"):
        optimized(rows(5, 95))
    with pytest.raises(fxq.BundleError, match="save the module it was made from"):
        fxq.save(optimized, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_torch_compile_takes_an_optimized_module(case):
    _, _, optimized, dtype = case
    arguments = call(dtype)
    compiled = torch.compile(optimized, backend="aot_eager")
    with torch.no_grad():
        assert error(compiled(*arguments), optimized(*arguments)) < 1e-2


CODE = """
import torch
from tests.test_optimize import call, recipe, rollout_in
import fxq
rollout = rollout_in(torch.float32)
q = fxq.quantize(rollout.model, rollout, recipe(8), progress=False)
print("onednn_verbose,begin")
q(*call(torch.float32)); fxq.optimize(q)(*call(torch.float32))
"""


@pytest.mark.sweep
def test_no_reference_primitive_of_onednn_multiplies_integers():
    """Signed activations in oneDNN's int8 linear fall back to a loop a thousand times slower than float."""
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    log = done.stdout.partition("onednn_verbose,begin")[2]
    assert "onednn_verbose" in log, "the log is empty: the test would see nothing"
    assert "ref_int8" not in log and "ref:any" not in log


@pytest.fixture
def floats_win(monkeypatch):
    """Outside of tests nothing is switched off; each linear is twice as fast in floats."""
    monkeypatch.delenv("FXQ_FLOATS_WHERE_FASTER")
    monkeypatch.setattr(float_where_faster, "_measured", lambda *given: (0.002, 0.001))
    return fxq.quantize(toy(), [rows(9, 96)], recipe(8), progress=False)


def test_what_is_slower_in_integers_is_left_in_floats_by_default(floats_win):
    fast = fxq.summary(fxq.optimize(floats_win))
    assert not fast.quantized and any("2 ms in integers" in row.reason for row in fast.kept)
    assert "layers in floats: 2, which take " in str(fast)


@pytest.mark.parametrize("how", ["argument", "environment", "a pass that measures"])
def test_switched_off_the_result_is_that_of_the_integers(how, floats_win, monkeypatch):
    wanted = {"argument": {"floats_where_faster": False}, "environment": {}}
    wanted["a pass that measures"] = {"passes": (FloatWhereFaster(margin=0.6), *FUSIONS)}
    if how == "environment":
        monkeypatch.setenv("FXQ_FLOATS_WHERE_FASTER", "0")
    fast = fxq.optimize(floats_win, **wanted[how])
    assert len(fxq.summary(fast).quantized) == 2 and not fxq.summary(fast).notes
    x = rows(9, 96)
    assert torch.equal(fast(x), fxq.optimize(floats_win, floats_where_faster=False)(x))


def test_another_word_in_the_environment_is_refused(floats_win, monkeypatch):
    monkeypatch.setenv("FXQ_FLOATS_WHERE_FASTER", "no")
    with pytest.raises(PassError, match="FXQ_FLOATS_WHERE_FASTER='no': expected 0, which measures nothing, or 1"):
        fxq.optimize(floats_win)


def test_a_rank_measures_nothing_and_says_so(floats_win):
    dataclasses.replace(Facts.of(floats_win), parallel={"rank": 0, "size": 2}).attach(floats_win)
    fast = fxq.summary(fxq.optimize(floats_win))
    assert len(fast.quantized) == 2
    (note,) = fast.notes["layers in floats"]
    assert note.endswith("this module is one rank's part of a model, and ranks would choose differently")


def test_elsewhere_than_on_a_cpu_nothing_is_measured_unasked(floats_win, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    assert not sys.modules["fxq.optimize"]._measures(QuantGraph.of(floats_win), Facts.of(floats_win), FUSIONS)


@needs("native")
def test_a_quantized_rollout_takes_no_more_memory_than_planned():
    config = CausalWanConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=6, text_dim=64, text_len=16)
    work = Workload(name="small", config=config, latent=(12, 16), steps=2)
    torch.manual_seed(0)
    model, frames = CausalWan(config).eval().requires_grad_(False).bfloat16(), 15
    batch = ({"prompt_embeds": torch.randn(1, 16, 64)}, Draws([1], (frames, 16, 12, 16)))
    rollout = SelfForcingRollout(model, [batch], SamplerConfig(steps=(1000, 500)))
    args, shapes = rollout.example_call()
    module = fxq.quantize(model, None, "w8a8-dynamic", example_inputs=args, dynamic_shapes=shapes, progress=False)
    fast = fxq.optimize(module, floats_where_faster=False)
    with LiveBytes() as sizes, rollout.using(fast):
        rollout.rollout(*batch)
    cache = memory.cache_bytes(work, frames, -1, memory.CACHE_FORMATS[0])
    call = memory.text_bytes(config) + memory.activation_bytes(work, frames, -1)
    assert cache + call / 2 < sizes.peak <= cache + call
