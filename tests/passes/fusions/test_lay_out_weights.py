"""Weights become panels where the native kernels read them, and stay with a reason where not."""

import pytest
import torch

import fxq
from fxq.core.ir import QuantGraph, Stage, get_tensor
from fxq.core.layer import quantized_layers
from fxq.core.pipeline import run_passes
from fxq.kernels import native
from fxq.kernels.gemm.panels import unpack_panels
from fxq.passes import MergeLinears
from fxq.passes.fusions.lay_out_weights import LayOutWeights
from tests.passes.test_share_inputs import model as siblings
from tests.toys import recipe, rows, toy


@pytest.fixture(params=["native", "none"])
def cpu(request, monkeypatch):
    """Why the native kernels cannot be called; the pass asks, whatever this machine has."""
    reason = "" if request.param == "native" else "no compiler"
    monkeypatch.setattr(native, "why_not", lambda: reason)
    return reason


def frozen(model=None, chosen=None, width=96):
    return fxq.quantize(model or toy(), [rows(9, width)], chosen or recipe(4), progress=False)


def laid_out(q, *passes):
    return run_passes(QuantGraph(q, Stage.FROZEN).fork(), (*passes, LayOutWeights()))


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_panels_of_the_same_integers_or_stay(cpu, bits):
    q = frozen(chosen=recipe(bits))
    graph = laid_out(q)
    assert graph.stage == Stage.BOUND and graph.log[-1][1] == (0 if cpu else 2)
    for layer in quantized_layers(q):
        name, before = f"{layer.name}.weight", layer.codes(q)
        after = get_tensor(graph.module, name)
        if cpu:
            assert after is get_tensor(q, name) and graph.remarks[layer.name] == [cpu]
        else:
            assert after.ndim == 4 and layer.name not in graph.remarks
            assert after.dtype == (torch.uint8 if bits == 4 else torch.int8)
            # [N, K] padded to whole panels, and two rows of sums.
            assert after.nbytes == -(-before.shape[0] // 64) * 64 * (before.shape[1] * bits // 8 + 2 * 4)
            assert torch.equal(unpack_panels(after, *before.shape, layer.split), before)
        assert get_tensor(q, name).ndim == 2  # the frozen module keeps its own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_in_float16_stay_with_the_reason(cpu, dtype):
    q = fxq.quantize(toy().to(dtype), [rows(9, 96).to(dtype)], recipe(), progress=False)
    graph = laid_out(q)
    if dtype == torch.float16:
        assert set(graph.remarks) == {"blocks.0.up", "blocks.0.down"} and graph.log[-1][1] == 0
        assert all("not float16" in text for (text,) in graph.remarks.values())
    else:
        assert graph.log[-1][1] == (0 if cpu else 2)


def test_one_weight_of_merged_layers_is_laid_out_once_and_refused_by_every_layers_name(cpu):
    graph = laid_out(frozen(siblings()), MergeLinears())
    names = [layer.name for layer in quantized_layers(graph.module)]
    assert len(names) > 1 and graph.log[-1][1] == (0 if cpu else 1)
    assert [name for name, texts in graph.remarks.items() if cpu and cpu in texts] == (names if cpu else [])


def test_layers_with_scales_per_token_say_why_they_are_not_fused(cpu):
    graph = laid_out(frozen(chosen=recipe(8, per_token=True)))
    for layer in ("blocks.0.up", "blocks.0.down"):
        apart = "input scales are measured per token: quantize stays apart from what gives its input"
        said = [apart, *([cpu] if cpu else [])]
        assert graph.remarks[layer] == said


def test_weights_on_another_device_stay(cpu):
    graph = QuantGraph(frozen(), Stage.FROZEN).fork()
    for name, tensor in list(graph.module.named_buffers()):
        if name.endswith(".weight"):
            fxq.core.ir.put_tensor(graph.module, name, tensor.to("meta"))
    assert LayOutWeights().run(graph) == 0 and not graph.remarks
