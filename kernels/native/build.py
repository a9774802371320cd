"""Compile the C++ sources once per machine and compiler, and load them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

from fxq import cpu

SOURCES = ("linear.cpp", "rows.cpp", "attention.cpp")
HEADERS = ("common.h", "tile.h")
NEEDS = ("avx512_vnni", "avx512_bf16", "avx512_vbmi2")
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512vbmi2", "avx512bf16", "fma")
FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-w", "-ffp-contract=off"]
FLAGS += [f"-m{name}" for name in INSTRUCTIONS]
FOLDER = pathlib.Path(__file__).parent


def missing() -> str:
    """What this machine lacks for the native kernels, or ""."""
    if os.environ.get("FXQ_NATIVE") == "0":
        return "native kernels are switched off by FXQ_NATIVE=0"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"native kernels are for Linux on x86_64, this is {platform.system()} on {platform.machine()}"
    if absent := cpu.missing(NEEDS):
        why = f"{cpu.LIMIT}={cpu.limit()} takes away" if cpu.limit() else "this one lacks"
        return f"native kernels need a CPU with {', '.join(NEEDS)}; {why} {', '.join(absent)}"
    if compiler() is None:
        return "native kernels are compiled at first use and there is no C++ compiler: install g++ or set CXX"
    return ""


def compiler() -> str | None:
    """Path of the C++ compiler: ``$CXX``, else g++, c++ or clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def cache_folder() -> pathlib.Path:
    """``$FXQ_CACHE_DIR``, else ``fxq`` in the user's cache folder, else in the temporary folder."""
    if chosen := os.environ.get("FXQ_CACHE_DIR"):
        return pathlib.Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "fxq"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder if os.access(folder, os.W_OK) else pathlib.Path(tempfile.mkdtemp(prefix="fxq-"))
    except OSError:
        return pathlib.Path(tempfile.mkdtemp(prefix="fxq-"))


def build(cxx: str, folder: pathlib.Path) -> pathlib.Path:
    """The shared library, compiled when this source, compiler and these flags were not compiled before.

    Raises:
        RuntimeError: with the first lines of the compiler's message.
    """
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((version, FLAGS)).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((FOLDER / name).read_bytes())
    target = folder / f"native-{digest.hexdigest()[:24]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # A private name until it is whole: several processes may compile at the same time.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        half = pathlib.Path(scratch) / target.name
        command = [cxx, *FLAGS, *(str(FOLDER / name) for name in SOURCES), "-o", str(half)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise RuntimeError(f"{cxx} cannot compile the native kernels: {' '.join(lines[:2]) or 'no message'}")
        half.replace(target)
    return target


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and why there is none. Compiles at the first call, a few seconds."""
    if reason := missing():
        return None, reason
    cxx = compiler()
    assert cxx is not None
    try:
        return ctypes.CDLL(str(build(cxx, cache_folder()))), ""
    except (OSError, RuntimeError) as error:
        return None, f"native kernels could not be built: {error}"
