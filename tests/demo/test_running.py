import fxq
from fxq.demo.running import measure_running
from tests.toys import recipe, wan_rollout


def test_time_of_a_chunk_and_bytes_are_those_of_what_runs():
    rollout = wan_rollout(seeds=(1,), frames=4)
    full = measure_running("full", rollout)
    parameters = sum(p.numel() * p.element_size() for p in rollout.denoiser.parameters())
    assert full.name == "full" and full.seconds > 0 and full.weight_bytes >= parameters
    assert full.cache_bytes > rollout.begin(*rollout.batches[0]).cache.nbytes()
    quantized = fxq.quantize(rollout.denoiser, rollout, recipe(8), progress=False)
    eight = measure_running("eight", rollout, fxq.optimize(quantized))
    assert eight.weight_bytes < full.weight_bytes and eight.cache_bytes == full.cache_bytes
