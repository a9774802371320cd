import weakref

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxq
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.planning import memory
from fxq.planning.memory import CACHE_FORMATS, cache_bytes, linear_calls, meta_model, weight_bytes
from fxq.planning.workloads import Workload, find_workload
from fxq.presets import PRESETS
from tests.toys import WAN, recipe, wan_rollout

BF16, INT8, QVG, KLT = CACHE_FORMATS
WIDE = CausalWanConfig(dim=512, ffn_dim=1792, num_heads=4, num_layers=3)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are alive, also on the meta device."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.seen[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key):
        self.now -= self.seen.pop(key)


@pytest.mark.parametrize(("config", "parameters"), [("wan_1_3b", 1.419e9), ("wan_14b", 14.288e9)])
def test_the_models_have_their_published_number_of_parameters_and_nothing_is_allocated(config, parameters):
    model = meta_model(getattr(CausalWanConfig, config)())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert weight_bytes(model) == pytest.approx(2 * parameters, rel=1e-3)


def test_whole_files_shrink_as_the_bits_do():
    model = meta_model(CausalWanConfig.wan_1_3b())
    bf16, w8, w4 = (weight_bytes(model, chosen) for chosen in (None, PRESETS["w8a8"], PRESETS["w4a8"]))
    assert 1.9 < bf16 / w8 < 2.0 and 3.4 < bf16 / w4 < 4.0


@pytest.mark.parametrize("bits", [8, 4])
def test_planned_bytes_are_those_of_a_model_that_was_quantized(bits):
    rollout = wan_rollout()
    module = fxq.quantize(rollout.denoiser, rollout, recipe(bits), progress=False)
    found = fxq.summary(module).quantized
    with_two_scales = [row for row in found if row.outliers]
    assert with_two_scales
    for row in found:
        planned = memory.quantized_bytes(row.shape[1], row.shape[0], bits)
        assert row.bytes == planned if row.outliers else row.bytes < planned
    quantized = {row.layer for row in found}
    calls = linear_calls(meta_model(WAN), 2, (4, 6))
    assert {call.layer for call in calls if memory.weight_bits(recipe(bits), call.layer, call.width) < 16} == quantized


def test_a_layer_that_int4_cannot_pack_stays_in_bf16():
    assert memory.weight_bits(PRESETS["w4a8"], "blocks.0.ffn.0", 96) == 4
    assert memory.weight_bits(PRESETS["w4a8"], "blocks.0.ffn.0", 100) == 16
    assert memory.weight_bits(PRESETS["w8a8"], "blocks.0.ffn.0", 100) == 8
    assert memory.weight_bits(PRESETS["w8a8"], "head.head", 96) == 16
    assert memory.weight_bits(None, "blocks.0.ffn.0", 96) == 16


def test_rows_of_linears_are_those_of_a_real_call():
    rollout, seen = wan_rollout(seeds=(1,)), {}
    model = rollout.denoiser
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, i, _, name=name: seen.__setitem__(name, i[0].shape[:-1].numel()))
    rollout.rollout(*rollout.batches[0])
    planned = {call.layer: call.rows for call in linear_calls(meta_model(WAN), 2, (4, 6))}
    assert planned == seen and planned["blocks.0.ffn.0"] == 12 and planned["blocks.0.cross_attn.k"] == 0


def test_hooks_are_gone_after_counting():
    model = meta_model(WAN)
    assert linear_calls(model, 1, (4, 6)) == linear_calls(model, 1, (4, 6))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_full_cache_is_the_published_one():
    workload = find_workload("self-forcing")
    assert cache_bytes(workload, 21, -1, BF16) == 2 * 30 * 21 * 1560 * 1536 * 2
    assert cache_bytes(workload, 180, -1, BF16) / 2**30 == pytest.approx(48.2, abs=0.05)


@pytest.mark.parametrize("stored", CACHE_FORMATS, ids=lambda stored: stored.name)
def test_a_window_stops_growing_and_a_full_cache_does_not(stored):
    workload = find_workload("longlive")
    sizes = [cache_bytes(workload, frames, 12, stored) for frames in (3, 6, 12, 15, 240)]
    assert sizes[0] < sizes[1] and sizes[3] == sizes[4]  # one span of a window is encoded at a time
    assert cache_bytes(workload, 240, -1, stored) > cache_bytes(workload, 120, -1, stored) > sizes[-1]


def test_eight_chunks_are_encoded_once_a_ninth_has_come():
    workload = find_workload("self-forcing")
    assert cache_bytes(workload, 24, -1, QVG) == cache_bytes(workload, 24, -1, BF16)
    encoded = cache_bytes(workload, 27, -1, QVG) - cache_bytes(workload, 3, -1, BF16)
    assert cache_bytes(workload, 24, -1, BF16) / encoded == pytest.approx(6.97, abs=0.01)  # arXiv 2602.02958
    sizes = [cache_bytes(workload, 240, -1, stored) for stored in (BF16, INT8, QVG, KLT)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_window_without_room_for_an_old_chunk_stays_in_bf16():
    workload = find_workload("krea-14b")
    assert cache_bytes(workload, 60, 6, QVG) == cache_bytes(workload, 60, 6, BF16)
    assert QVG.policy(workload, 9).span == 1 and QVG.policy(workload, 90).span == 8


@pytest.mark.parametrize(
    ("config", "frames"), [(WIDE, 3), (WIDE, 1), (CausalWanConfig(num_layers=7), 3)], ids=["chunk", "frame", "1.3B"]
)
def test_estimated_activations_are_near_the_peak_of_a_call(config, frames):
    model, latent = meta_model(config), (30, 52)
    workload = Workload(name="some", config=config, latent=latent, frames_per_chunk=frames)
    with torch.inference_mode(), LiveBytes() as live:
        memory._call_on_meta(model, frames, latent)
    inputs = 2 * 2 * (config.text_len + workload.chunk_tokens) * config.dim
    estimate = memory.activation_bytes(workload, 2 * frames, -1)
    assert 0.9 < estimate / (live.peak - inputs) < 1.25


def test_meta_models_run_the_code_of_the_model():
    assert isinstance(meta_model(WAN), CausalWan)
    assert len(linear_calls(meta_model(CausalWanConfig.wan_1_3b()), 3, (60, 104))) == 306
