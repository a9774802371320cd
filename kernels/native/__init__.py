"""C++ kernels for x86 CPUs with AVX512 VNNI and BF16, compiled at first use and called through ctypes."""

from __future__ import annotations


def ready() -> bool:
    """Whether the native kernels can be called."""
    return False


def why_not() -> str:
    """Why they cannot, or ""."""
    return "not written"
