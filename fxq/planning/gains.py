"""The gain to expect from quantizing on this machine, or none and why."""

from __future__ import annotations

import torch

from fxq import cpu
from fxq.core.method import Scheme
from fxq.dtypes import dtype_name
from fxq.kernels import native
from fxq.kernels.gemm.op import ON_CPU, in_float_note
from fxq.kernels.jit import HAS_TRITON, triton
from fxq.models.causal_wan import CausalWanConfig
from fxq.passes.kernel_times import LinearSize, kernel_calls, rounds_in_turns
from fxq.planning.environment import Device
from fxq.planning.gpus import known_gpu
from fxq.planning.memory import linear_calls, meta_model
from fxq.planning.roofline import gain
from fxq.planning.workloads import Workload
from fxq.runtime import timing

OLDEST_INT8, OLDEST_FP8 = (8, 0), (8, 9)
"""Compute capability."""
ROWS, CHANNELS, OUTLIERS = 1560, 1536, 48
"""Of the linear whose speed is measured: a projection of Wan 1.3B for a frame, as in ``fxq bench --level linear``."""
ROUNDS = 15
"""In which it is measured: machines that others use need more than a few."""
WORTH = 1.02
"""A speed-up below it is called none."""


def no_gpu() -> str:
    """Why nothing runs on a GPU on a machine where torch sees none."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is not built for CUDA"
    return "torch sees no GPU: is there one, and does its driver fit the CUDA version of torch?"


def no_triton() -> str:
    """Why Triton's kernels do not run on a GPU here, or ""."""
    if HAS_TRITON:
        return ""
    return (
        "the kernels are for NVIDIA GPUs"
        if triton is not None
        else "Triton is not installed: pip install 'fxq[triton]'"
    )


def arch_name(capability: tuple[int, int]) -> str:
    """As "sm_89"."""
    return f"sm_{capability[0]}{capability[1]}"


def cpu_gain() -> str:
    """What quantizing brings on this CPU, as measured now on one linear where its kernels run, or none and why."""
    if native.ready():
        slower = f"; {why}" if (why := native.why_slower()) else ""
        return f"{cpu_speeds()} ({native.name()}{slower}); `fxq bench` measures more"
    if ON_CPU == "int_mm":
        return f"little: only the products are integer, because {native.why_not()}; `fxq bench` measures it"
    return f"none, because {in_float_note()}"


def cpu_speeds() -> str:
    """Speed of integers over the float linear of this CPU, on one thread, measured in turns on one size."""
    dtype = torch.float32 if cpu.no_bfloat16() else torch.bfloat16
    size = LinearSize(ROWS, CHANNELS, CHANNELS, CHANNELS - OUTLIERS, dtype, "cpu")
    schemes = (Scheme(), Scheme(weight_bits=4))
    with timing.settings(1):
        *integers, floats = rounds_in_turns(kernel_calls(size, [*schemes, None]), "cpu", ROUNDS)
    found = (timing.ratio(floats, seconds).median for seconds in integers)
    told = (f"{scheme.label} {ratio:.2f}x" for scheme, ratio in zip(schemes, found, strict=True))
    return (
        f"{' and '.join(told)} of {dtype_name(dtype)}, a linear of {ROWS} x {CHANNELS} -> {CHANNELS} on one thread, "
        "measured now"
    )


def gpu_gain(device: Device) -> str:
    """The estimate for a 1.3B model on a GPU, or none and why."""
    if reason := no_triton():
        return f"none, because {reason}; memory is saved all the same"
    if int(device.arch.removeprefix("sm_")) < 10 * OLDEST_INT8[0] + OLDEST_INT8[1]:
        return (
            f"none, because {device.arch} is older than {arch_name(OLDEST_INT8)}, the oldest the kernels are built for"
        )
    gpu = known_gpu(device.name)
    if gpu is None:
        return f"unknown: {device.name} is not in the table of GPUs; benchmarks/gpu.py measures it"
    workload = Workload(name="1.3B", config=CausalWanConfig.wan_1_3b())
    linears = linear_calls(meta_model(workload.config), workload.frames_per_chunk, workload.latent)
    low, high = gain(workload, linears, gpu, 4 * workload.chunk_tokens)
    estimate = f"{low:.2f}x to {high:.2f}x over compiled bf16 (W8A8, 1.3B, middle of a 5 s video)"
    if (low + high) / 2 < WORTH:
        return f"none, because {gpu.attainable.note}; estimate {estimate}"
    return f"estimate {estimate}, not measured"
