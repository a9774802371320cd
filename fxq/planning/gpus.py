"""GPUs as data: datasheet peaks, memory, and the part of a peak that kernels are assumed to reach."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

GIB = 2**30

Range = tuple[float, float]
"""(low, high)."""


class PlanningError(ValueError):
    """A GPU, a model or a setting that cannot be planned with."""


@dataclass(frozen=True, kw_only=True)
class Attainable:
    """Fractions of a peak that are assumed to be reached, (low, high).

    ``bf16`` and ``int8`` of the dense tensor peak in linears, ``attention`` of the bf16 peak, ``bandwidth`` of memory.
    """

    bf16: Range
    int8: Range
    attention: Range
    bandwidth: Range
    note: str


AMPERE = Attainable(
    bf16=(0.60, 0.85),
    int8=(0.40, 0.95),
    attention=(0.45, 0.75),
    bandwidth=(0.70, 0.90),
    note="int8 reported for A100 at 40 % with Triton and 80 % with CUTLASS, implied near the peak by a paper on A6000",
)
ADA = Attainable(
    bf16=(0.65, 0.92),
    int8=(0.40, 0.70),
    attention=(0.50, 1.0),
    bandwidth=(0.70, 0.90),
    note="int8 and attention as reported for RTX 4090 and L40",
)
HOPPER = Attainable(
    bf16=(0.55, 0.80),
    int8=(0.35, 0.65),
    attention=(0.34, 0.55),
    bandwidth=(0.70, 0.88),
    note="attention from FlashAttention-2 to FlashAttention-3, as reported for H100",
)
BLACKWELL = Attainable(
    bf16=(0.50, 0.75),
    int8=(0.08, 0.30),
    attention=(0.25, 0.55),
    bandwidth=(0.70, 0.88),
    note="int8 has no fast path in Triton on this architecture: products fall to an older instruction",
)
BLACKWELL_CONSUMER = Attainable(
    bf16=(0.60, 0.90),
    int8=(0.35, 0.70),
    attention=(0.45, 0.95),
    bandwidth=(0.70, 0.90),
    note="taken over from Ada: the same instructions, no figures of its own",
)


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Dense peaks in TFLOP/s (``bf16``, float32 sums) and TOPS (``int8``), ``bandwidth`` in GB/s, and memory in GiB, about
    what the driver reports.
    """

    name: str
    arch: str
    memory_gib: float
    bf16: float
    int8: float
    bandwidth: float
    attainable: Attainable
    aliases: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.memory_gib * GIB)


GPUS: tuple[Gpu, ...] = (
    Gpu("RTX 3090", "sm_86", 23.7, 71, 284, 936, AMPERE),
    Gpu("RTX A6000", "sm_86", 47.5, 155, 310, 768, AMPERE, ("A6000",)),
    Gpu("A40", "sm_86", 44.5, 150, 299, 696, AMPERE),
    Gpu("A100 40GB", "sm_80", 39.4, 312, 624, 1555, AMPERE, ("A100-40", "A100-SXM4-40GB", "A100-PCIE-40GB")),
    Gpu("A100 80GB", "sm_80", 79.2, 312, 624, 2039, AMPERE, ("A100", "A100-80", "A100-SXM4-80GB", "A100 80GB PCIe")),
    Gpu("RTX 4090", "sm_89", 23.6, 165, 661, 1008, ADA),
    Gpu("RTX 6000 Ada", "sm_89", 47.5, 364, 729, 960, ADA, ("6000 Ada", "RTX 6000 Ada Generation")),
    Gpu("L4", "sm_89", 22.0, 121, 242, 300, ADA),
    Gpu("L40", "sm_89", 44.5, 181, 362, 864, ADA),
    Gpu("L40S", "sm_89", 44.5, 362, 733, 864, ADA),
    Gpu("H100 PCIe", "sm_90", 79.1, 756, 1513, 2000, HOPPER),
    Gpu("H100", "sm_90", 79.1, 989, 1979, 3350, HOPPER, ("H100 SXM", "H100 80GB HBM3")),
    Gpu("H200", "sm_90", 139.8, 989, 1979, 4800, HOPPER, ("H200 SXM",)),
    Gpu("B200", "sm_100", 178.3, 2250, 4500, 7700, BLACKWELL),
    Gpu("RTX 5090", "sm_120", 31.4, 210, 838, 1792, BLACKWELL_CONSUMER),
    Gpu(
        "RTX PRO 6000",
        "sm_120",
        94.9,
        503,
        1007,
        1792,
        BLACKWELL_CONSUMER,
        ("PRO 6000", "RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell Server Edition"),
    ),
)
"""Peaks are datasheet or third-party figures."""

_VENDOR = re.compile(r"nvidia|geforce|[^a-z0-9]")


def _plain(name: str) -> str:
    """Lower case without vendor, spaces and signs; "RTX" in front of a number goes too: "4090" is enough."""
    return re.sub(r"^rtx(?=\d{4}$)", "", _VENDOR.sub("", name.lower()))


def known_gpu(name: str) -> Gpu | None:
    """The GPU of a name, as a user or a driver spells it ("4090", "NVIDIA GeForce RTX 4090"), or None."""
    wanted = _plain(name)
    return next((gpu for gpu in GPUS if wanted in map(_plain, (gpu.name, *gpu.aliases))), None)


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, see :func:`known_gpu`.

    Raises:
        PlanningError: when it is not in the table, with the closest names.
    """
    if gpu := known_gpu(name):
        return gpu
    names_by_plain = {_plain(gpu.name): gpu.name for gpu in GPUS}
    names = [names_by_plain[key] for key in difflib.get_close_matches(_plain(name), names_by_plain, n=3, cutoff=0.5)]
    hint = f"; the closest are {', '.join(names)}" if names else ""
    raise PlanningError(f"unknown GPU {name!r}{hint}. There are: {', '.join(gpu.name for gpu in GPUS)}")
