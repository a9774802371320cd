"""Registers that Linux hands out on request: the tiles of AMX."""

from __future__ import annotations

import ctypes
import functools
import os

ARCH_PRCTL, REQUEST, TILES = 158, 0x1023, 18
"""The system call of x86-64, ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA."""


@functools.cache
def tiles_refused() -> str:
    """Why this process may not use the tiles, or "". Asks for them once; threads and forks inherit the answer."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(*(ctypes.c_long(number) for number in (ARCH_PRCTL, REQUEST, TILES))) == 0:
        return ""
    return f"Linux does not hand out the tile registers ({os.strerror(ctypes.get_errno())})"
