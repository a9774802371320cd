"""What only a GPU shows: graphs compute what the module does, and neither wait for the host nor fill the memory."""

import contextlib
import gc

import pytest
import torch

import fxq
from fxq.calibration.rollout import Draws
from fxq.lab import tiny_rollout
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout
from fxq.models.tiny import load_tiny
from fxq.planning.memory import CACHE_FORMATS, activation_bytes, cache_bytes, meta_model, text_bytes, weight_bytes
from fxq.planning.workloads import Workload
from fxq.runtime.cuda_graphs.refusals import CudaGraphError
from tests.features import demand

pytestmark = pytest.mark.gpu

CONFIG = CausalWanConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=6, text_dim=256, text_len=64)
WORKLOAD = Workload(name="100 M", config=CONFIG, latent=(32, 48), steps=2)
CHUNKS, SEED = 5, 1


@contextlib.contextmanager
def no_waiting():
    """Whatever waits for the GPU is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def optimized(rollout, recipe, folder):
    """The rollout's model quantized on the CPU, and optimized on the GPU."""
    args, shapes = rollout.example_call()
    module = fxq.quantize(rollout.denoiser, None, recipe, example_inputs=args, dynamic_shapes=shapes, progress=False)
    fxq.save(module, folder)
    return fxq.optimize(fxq.load(folder, "cuda"))


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w4a8-dynamic"])
def test_a_rollout_through_graphs_is_the_eager_one_bit_for_bit_and_does_not_wait(tmp_path, recipe):
    demand("gpu")
    rollout = tiny_rollout(load_tiny(), 1, seed=0, unseen=True)[0]
    fast = optimized(rollout, recipe, tmp_path / "bundle")
    rollout = tiny_rollout(load_tiny().cuda(), 1, seed=0, unseen=True)[0]
    with rollout.using(fast):
        want = rollout.rollout(*rollout.batches[0])
    graphs = fxq.CudaGraphs(fast, limit=1 + rollout.units(*rollout.batches[0]))
    with rollout.using(graphs):
        first = rollout.rollout(*rollout.batches[0])
    assert len(graphs.captures) == 1 + rollout.units(*rollout.batches[0])

    def watched(*args):
        with no_waiting():
            return graphs(*args)

    with rollout.using(watched):
        again = rollout.rollout(*rollout.batches[0])
    assert torch.equal(first, want) and torch.equal(again, want)
    assert len(graphs.captures) == 1 + rollout.units(*rollout.batches[0])


def test_a_call_on_another_stream_reads_what_was_copied_for_it():
    demand("gpu")
    weight = torch.randn(512, 512, device="cuda")
    graphs, stream = fxq.CudaGraphs(lambda x: x @ weight, device="cuda"), torch.cuda.Stream()
    for i in range(20):
        x = torch.full((512, 512), float(i), device="cuda")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if i % 2 else torch.cuda.current_stream()):
            assert torch.equal(graphs(x), x @ weight)
        torch.cuda.current_stream().wait_stream(stream)


def test_a_call_that_waits_is_refused_and_leaves_the_gpu_as_it_was():
    demand("gpu")
    graphs, x = fxq.CudaGraphs(lambda x: x * x.sum().item(), device="cuda"), torch.ones(4, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.raises(CudaGraphError, match="the call cannot be captured"):
        graphs(x)
    assert torch.cuda.current_stream() == stream and float((x + 1).sum()) == 8
    assert torch.equal(fxq.CudaGraphs(lambda x: 2 * x, device="cuda")(x), 2 * x)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A rollout of a model of 100 M parameters, of which only the patch embedding lies on the GPU, and it in W8A8."""
    demand("gpu")
    torch.manual_seed(SEED)
    model = CausalWan(CONFIG).eval().requires_grad_(False).bfloat16()
    channels, (height, width) = CONFIG.in_dim, WORKLOAD.latent
    draws = Draws([SEED], (WORKLOAD.frames_per_chunk * CHUNKS, channels, height, width))
    batches = [({"prompt_embeds": torch.randn(1, CONFIG.text_len, CONFIG.text_dim)}, draws)]
    rollout = SelfForcingRollout(model, batches, SamplerConfig(steps=(1000, 500)))
    fast = optimized(rollout, "w8a8-dynamic", tmp_path_factory.mktemp("bundle"))
    model.patch_embedding.cuda()
    return rollout, fast


def planned():
    """Bytes of the longest cache and of a call, by the planner."""
    frames = WORKLOAD.frames_per_chunk * CHUNKS
    cache = cache_bytes(WORKLOAD, frames, -1, CACHE_FORMATS[0])
    return cache + text_bytes(CONFIG), activation_bytes(WORKLOAD, frames, -1)


def made_by(rollout, module):
    """Most bytes of tensors while a video is made, beside what lies there before and afterwards."""
    for _ in range(2):  # at first libraries take their workspaces
        torch.cuda.synchronize()
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with rollout.using(module):
            latents = rollout.rollout(*rollout.batches[0])
        assert bool(latents.isfinite().all())
        del latents
    return torch.cuda.max_memory_allocated() - rest


def taken():
    """Bytes that the process holds, and could not give back."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_w8a8_needs_little_more_than_half_the_weights_and_the_planned_cache(large):
    rollout, fast = large
    tensors = [*fast.parameters(), *fast.buffers()]
    own = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    cache, call = planned()
    assert own + made_by(rollout, fast) <= 0.55 * weight_bytes(meta_model(CONFIG)) + cache + call


def test_graphs_take_one_more_cache_and_one_call_however_many_there_are(large):
    rollout, fast = large
    cache, call = planned()
    eager = made_by(rollout, fast)
    before = taken()
    graphs = fxq.CudaGraphs(fast)
    made = made_by(rollout, graphs)
    assert len(graphs.captures) == 1 + CHUNKS
    assert graphs.nbytes <= 2.5 * cache + call  # memory that grows by half, and what it had
    blocks = 64 << 20  # the allocator takes whole ones; and a workspace
    assert taken() - before <= graphs.nbytes + call + blocks
    assert made <= eager
    del graphs
    assert taken() - before <= blocks
