"""Keep freed memory in the process: large temporaries are not page-faulted again at every call."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = 2**31 - 1


def keep_memory() -> bool:
    """Tell glibc to serve large blocks from the heap and to give nothing back to the system.

    By default glibc maps each block above 32 MB anew, and every page of it costs a fault: elementwise operations on
    large activations then run several times slower. The setting holds for the whole process and cannot be undone; its
    memory stays at the peak. The same as ``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` in the environment.

    Returns:
        Whether it was set: False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(option, _NEVER) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)])
