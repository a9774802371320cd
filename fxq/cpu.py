"""What instructions this CPU has, or is to be taken to have: the one place that is asked.

``FXQ_CPU=avx512`` makes a larger CPU behave as one without AMX, ``FXQ_CPU=avx_vnni`` as one with AVX2 and the VNNI of
256 bits, ``FXQ_CPU=avx2`` as one with AVX2 only, ``FXQ_CPU=portable`` as one that fxq has no kernels for. The first
reaches oneDNN and MKL, the others torch and inductor too, to limit them to AVX2, through their own environment
variables, which they read once: so it has to be set before torch computes anything. On AArch64 it is
``FXQ_CPU=dotprod``, which takes the matrix products of int8 away, and ``portable``, both from fxq alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import platform
import sys
import warnings
from collections.abc import Iterable

ON_ARM = platform.machine().lower() in ("aarch64", "arm64")
LIMIT = "FXQ_CPU"
"""Environment variable: one of :data:`LIMITS`, or unset for what the CPU has."""
ABOVE_AVX2 = ("avx512", "avx10", "amx", "avx_vnni", "avx_ne_convert", "avx_ifma")
"""How the names of instructions begin that a CPU with AVX2 only does not have."""
_LIMITS_OF_X86: dict[str, tuple[str, ...]] = {
    "avx512": ("amx",),
    "avx_vnni": tuple(name for name in ABOVE_AVX2 if name != "avx_vnni"),
    "avx2": ABOVE_AVX2,
    "portable": ("avx", "amx", "fma", "f16c"),
}
_LIMITS_OF_ARM: dict[str, tuple[str, ...]] = {"dotprod": ("i8mm",), "portable": ("dot", "i8mm")}
LIMITS = _LIMITS_OF_ARM if ON_ARM else _LIMITS_OF_X86
"""What ``FXQ_CPU`` may be, and how the names of the instructions begin that it takes away."""
VNNI = ("avx512_vnni", "avx_vnni")
X86 = ("x86_64", "amd64", "i686", "x86")
_MARCH_OF_AVX2 = "x86-64-v3"
MARCH = {} if ON_ARM else dict.fromkeys(("avx_vnni", "avx2", "portable"), _MARCH_OF_AVX2)
"""The limit in the words of compilers, which use AMX and the VNNI of 256 bits only where they are told to."""
_AT_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "TORCHINDUCTOR_CPP_MARCH": _MARCH_OF_AVX2,
}
LIBRARIES: dict[str, dict[str, str]] = {
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16", "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3"},
    "avx_vnni": _AT_AVX2 | {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
    "avx2": _AT_AVX2,
    "portable": {} if ON_ARM else _AT_AVX2,
}
"""Environment variables that limit torch's libraries, by what ``FXQ_CPU`` says. Those of AArch64 know none."""
_OF_OLDER_TORCH = {
    "_is_avx2_supported": ("avx2", "fma3"),
    "_is_avx512_supported": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_cd"),
    "_is_avx512_bf16_supported": ("avx512_bf16",),
    "_is_vnni_supported": ("avx512_vnni",),
    "_is_amx_tile_supported": ("amx_tile", "amx_int8", "amx_bf16"),
}
"""What a torch without ``torch.cpu.get_capabilities`` can say, by the function that says it."""


def limit() -> str:
    """What ``FXQ_CPU`` asks for, "" when it is not set.

    Raises:
        ValueError: for a value that is none of :data:`LIMITS`.
    """
    chosen = os.environ.get(LIMIT, "").strip().lower()
    if chosen and chosen not in LIMITS:
        raise ValueError(f"{LIMIT}={chosen!r}: expected {', '.join(LIMITS)}, or unset for what this CPU has")
    return chosen


def limit_libraries() -> None:
    """Hand the limit on to torch's libraries; those who chose one themselves keep it.

    Warns where torch had started before, as far as it tells, and goes on with what this CPU has.
    """
    variables = LIBRARIES.get(limit(), {})
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    if "ATEN_CPU_CAPABILITY" in variables and "torch" in sys.modules:
        import torch

        used = torch.backends.cpu.get_cpu_capability()
        if used.startswith("AVX512"):
            settings = " ".join(f"{name}={value}" for name, value in variables.items())
            warnings.warn(
                f"{LIMIT}={limit()} came after torch had started: fxq keeps to it, torch goes on with {used}. "
                f"Set it before Python starts, or import fxq before anything is computed; torch takes {settings}",
                RuntimeWarning,
                stacklevel=2,
            )


def features(limited: bool = True) -> frozenset[str]:
    """Names of the instructions that may be used, as ``torch.cpu.get_capabilities`` spells them.

    Args:
        limited: by ``FXQ_CPU``; False: what the CPU has.
    """
    return _features(limit() if limited else "")


@functools.cache
def _features(limited: str) -> frozenset[str]:
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        found = {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    else:
        asked = {f: names for f, names in _OF_OLDER_TORCH.items() if getattr(torch.cpu, f, bool)()}
        found = {name for names in asked.values() for name in names}
    if ON_ARM and sys.platform == "linux":
        found |= of_hwcap(*_hwcap())
    return frozenset(name for name in found if not name.startswith(LIMITS.get(limited, ())))


def of_hwcap(hwcap: int, hwcap2: int) -> set[str]:
    """Instructions of AArch64 that the kernels use, by what Linux says of the CPU (``asm/hwcap.h``)."""
    return {name for name, there in (("dot", hwcap >> 20 & 1), ("i8mm", hwcap2 >> 13 & 1)) if there}


def _hwcap() -> tuple[int, int]:
    read = ctypes.CDLL(None).getauxval
    read.restype, read.argtypes = ctypes.c_ulong, (ctypes.c_ulong,)
    return read(16), read(26)  # AT_HWCAP, AT_HWCAP2


def above_avx2() -> bool:
    """Whether there is anything that ``FXQ_CPU=avx2`` takes away."""
    return any(name.startswith(ABOVE_AVX2) for name in features())


def missing(names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that are not among :func:`features`."""
    here = features()
    return tuple(name for name in names if name not in here)


def no_bfloat16() -> str:
    """Why oneDNN has no bfloat16 kernels on this CPU, or ""."""
    if missing(("avx_ne_convert",)) and (absent := missing(("avx512_bw", "avx512_vl", "avx512_dq"))):
        return f"not on this CPU: oneDNN's bfloat16 needs avx_ne_convert, or {', '.join(absent)} that it lacks"
    return ""


def has_vnni() -> bool:
    """Whether products of bytes add up in 32 bits."""
    return len(missing(VNNI)) < len(VNNI)


def saturates() -> bool:
    """Whether unsigned times signed bytes saturate: x86 without VNNI adds pairs of such products in 16 bits.

    Products stay exact where one factor has at most 7 bits. The libraries here use those instructions all the same
    (pytorch/pytorch#136746, pytorch/ao#4266).
    """
    return platform.machine().lower() in X86 and not has_vnni()


def lacks() -> str:
    """That this CPU has no VNNI, and whether the switch is why; of others than x86, that torch multiplies in float."""
    if platform.machine().lower() not in X86:
        return f"torch's product of integers is not used on {platform.machine()}"
    switch = f" (as {LIMIT}={limit()} says)" if limit() else ""
    return f"this CPU has no VNNI{switch}"


limit_libraries()


def name() -> str:
    """Name of the processor's model, as the system tells it."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(names, "") or platform.processor()
