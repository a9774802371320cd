"""For which CPUs a compiled program holds machine code, and whether this is one of them."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Mapping

from fxq import cpu
from fxq.export.capture import ExportError

COMPILED = ("sse", "ssse", "avx", "amx", "fma", "f16c", "bmi", "lzcnt", "popcnt")
"""How the names of instructions begin that compiled code may hold."""
NEVER_COMPILED = ("sse4a", "fma4", "avx10_1", "avx10_2")
"""No compiler takes these by itself, or they are other names of what is listed."""


def compiled_for() -> list[str]:
    """Instructions that code compiled here may use; a compiler takes the others only where it is told to."""
    names = cpu.features(limited=cpu.limit() not in cpu.MARCH or bool(march_setting()))
    return sorted(name for name in names if name.startswith(COMPILED) and name not in NEVER_COMPILED)


def march_setting() -> dict[str, object]:
    """Inductor's setting that keeps its compiler to ``FXQ_CPU``; nothing where that needs none or torch has none."""
    from torch import _inductor

    march = cpu.MARCH.get(cpu.limit())
    return {"cpp.march": march} if march and hasattr(_inductor.config.cpp, "march") else {}


def refuse_other_cpu(file: pathlib.Path, facts: Mapping[str, object]) -> None:
    """A package runs on CPUs that have what the one had that compiled it; others crash, or saturate without a word.

    Args:
        file: with the facts, for messages.
        facts: of a compiled program.

    Raises:
        ExportError: naming what this CPU lacks.
    """
    needed = facts.get("cpu")
    if needed is None:
        if cpu.saturates() and facts.get("integer_products"):
            text = "compiled by an older fxq, which did not check for it, its 8-bit products may saturate"
            warnings.warn(f"{file.parent}: {cpu.lacks()}; {text}: export it again", RuntimeWarning, stacklevel=3)
        return
    if not isinstance(needed, list) or not all(isinstance(name, str) for name in needed):
        raise ExportError(f"{file}: cpu is {needed!r}; the program is damaged, export it again")
    if lacking := cpu.missing(needed):
        here = f", or {cpu.LIMIT}={cpu.limit()} takes it away" if cpu.limit() else ""
        raise ExportError(
            f"{file.parent}: compiled for a CPU with {', '.join(lacking)}, which this one does not have{here}; export "
            f"it here, or with {cpu.LIMIT}=avx2 for every CPU that has AVX2"
        )
