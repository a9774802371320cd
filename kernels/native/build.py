"""Compile the C++ sources once per machine and compiler, and load them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass

from fxq import cpu
from fxq.kernels.native.cache import cache_folder, is_own_file, why_shared
from fxq.kernels.native.permission import tiles_refused


@dataclass(frozen=True)
class InstructionSet:
    """What kernels are compiled for.

    Attributes:
        kernel: how reports name the kernels.
        needs: instructions as :func:`fxq.cpu.features` spells them.
        flags: the same in the words of compilers, behind "-m".
        sources: C++ files; they choose headers by what the compiler may use.
        attention: dtypes whose attention is among them, by name; attention in 8 bits takes float32 and bfloat16.
    """

    kernel: str
    needs: tuple[str, ...]
    flags: tuple[str, ...]
    sources: tuple[str, ...]
    attention: tuple[str, ...] = ()


_SOURCES = (
    "linear.cpp",
    "rows.cpp",
    "pack.cpp",
    "codes.cpp",
    "cluster.cpp",
    "unpack.cpp",
    "attention.cpp",
    "attention_int8.cpp",
)
AVX512 = InstructionSet(
    "native",
    ("avx512_vnni", "avx512_bf16", "avx512_vbmi2"),
    ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512vbmi2", "avx512bf16", "fma"),
    _SOURCES,
    attention=("bfloat16",),
)
AMX = InstructionSet(
    "native amx",
    (*AVX512.needs, "amx_tile", "amx_int8", "amx_bf16"),
    (*AVX512.flags, "amx-tile", "amx-int8", "amx-bf16"),
    _SOURCES,
    attention=AVX512.attention,
)
VNNI = InstructionSet(
    "native vnni",
    ("avx512_vnni",),
    ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma"),
    _SOURCES,
)
AVX2 = InstructionSet("native avx2", ("avx2", "fma3"), ("avx2", "fma"), _SOURCES, attention=("float32", "bfloat16"))
AVX_VNNI = InstructionSet(
    "native avx_vnni", (*AVX2.needs, "avx_vnni"), (*AVX2.flags, "avxvnni"), _SOURCES, attention=AVX2.attention
)
DOTPROD = InstructionSet(
    "native dotprod", ("dot",), ("arch=armv8.2-a+dotprod",), _SOURCES, attention=("float32", "bfloat16")
)
I8MM = InstructionSet(
    "native i8mm", (*DOTPROD.needs, "i8mm"), ("arch=armv8.2-a+dotprod+i8mm",), _SOURCES, attention=DOTPROD.attention
)
ARCHITECTURES = {"x86_64": (AMX, AVX512, VNNI, AVX_VNNI, AVX2), "aarch64": (I8MM, DOTPROD)}
"""The sets of each, from the fastest."""
SETS = ARCHITECTURES.get(platform.machine(), ())
"""Those of this machine's architecture."""
FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-w", "-ffp-contract=off"]
FOLDER = pathlib.Path(__file__).parent
VERSION_SECONDS, COMPILE_SECONDS = 30, 600


def missing() -> str:
    """What this machine lacks for the native kernels, or ""."""
    if os.environ.get("FXQ_NATIVE") == "0":
        return "native kernels are switched off by FXQ_NATIVE=0"
    if platform.system() != "Linux" or not SETS:
        names = " and ".join(ARCHITECTURES)
        return f"native kernels are for Linux on {names}, this is {platform.system()} on {platform.machine()}"
    if instruction_set() is None:
        needs = SETS[-1].needs
        why = f"{cpu.LIMIT}={cpu.limit()} takes away" if cpu.limit() else "this one lacks"
        absent = ", ".join(cpu.missing(needs))
        return f"native kernels need a CPU with {', '.join(needs)}; {why} {absent}"
    if compiler() is None:
        return "native kernels are compiled at first use and there is no C++ compiler: install g++ or set CXX"
    return ""


def instruction_set() -> InstructionSet | None:
    """The fastest that this CPU has and that :func:`library` did not fail to load, or None."""
    return next((found for found in SETS if not cpu.missing(found.needs) and found.kernel not in FAILED), None)


FAILED: dict[str, str] = {}
"""Why kernels that the CPU has the instructions for are not used, by their name."""


def why_slower() -> str:
    """Why the kernels in use are not the fastest that the CPU has the instructions for, or ""."""
    return "; ".join(f"no {kernel} kernels: {reason}" for kernel, reason in FAILED.items())


def compiler() -> str | None:
    """The C++ compiler with its own options: ``$CXX`` (as "g++ -O2"), else the path of g++, c++ or clang++."""
    chosen = os.environ.get("CXX", "").strip()
    for name in [chosen] if chosen else ["g++", "c++", "clang++"]:
        try:
            first, *options = shlex.split(name)
        except ValueError:
            continue
        if path := shutil.which(first):
            return shlex.join([path, *options])
    return None


def build(cxx: str, folder: pathlib.Path, target: InstructionSet) -> pathlib.Path:
    """The shared library for an instruction set, compiled where source, compiler and flags were not compiled before.

    A library in ``folder`` counts only where this user alone can have written it.

    Raises:
        RuntimeError: with the first lines of the compiler's message, when it takes too long, or when others can write
            into the folder.
    """
    command = shlex.split(cxx)
    version = _run([*command, "--version"], VERSION_SECONDS).stdout
    flags = [*FLAGS, *(f"-m{name}" for name in target.flags)]
    digest = hashlib.sha256(repr((version, flags, *command[1:])).encode())
    sources = [FOLDER / name for name in target.sources]
    for path in (*sources, *sorted(FOLDER.glob("*.h"))):
        digest.update(path.read_bytes())
    file = folder / f"native-{digest.hexdigest()[:24]}.so"
    if is_own_file(file):
        return file
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if reason := why_shared(folder):
        raise RuntimeError(f"{reason}; set FXQ_CACHE_DIR to a folder of your own")
    # A private name until it is whole: several processes may compile at the same time.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        half = pathlib.Path(scratch) / file.name
        done = _run([*command, *flags, *map(str, sources), "-o", str(half)], COMPILE_SECONDS)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise RuntimeError(f"{cxx} cannot compile the native kernels: {' '.join(lines[:2]) or 'no message'}")
        half.chmod(0o600)
        half.replace(file)
    return file


def _run(command: list[str], seconds: int) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"{command[0]} does not end within {seconds} seconds; set CXX to another compiler"
        ) from error


def load(target: InstructionSet) -> ctypes.CDLL:
    """The library for an instruction set that the CPU has, compiled where it was not before.

    Raises:
        RuntimeError: as :func:`build`, or where the system does not hand out the registers.
        OSError: where the file cannot be written or loaded.
    """
    cxx = compiler()
    assert cxx is not None
    if "amx_tile" in target.needs and (refused := tiles_refused()):
        raise RuntimeError(refused)
    return ctypes.CDLL(str(build(cxx, cache_folder(), target)))


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and why there is none. Compiles at the first call, a few seconds.

    Where the fastest instruction set's cannot be built or used it is the next one's, and a warning says why.
    """
    if reason := missing():
        return None, reason
    while (target := instruction_set()) is not None:
        try:
            loaded = load(target)
        except (OSError, RuntimeError) as error:
            FAILED[target.kernel] = str(error)
            continue
        if slower := why_slower():
            warnings.warn(f"{slower}; the {target.kernel} kernels are used", RuntimeWarning, stacklevel=2)
        return loaded, ""
    reasons = list(FAILED.values())
    FAILED.clear()
    return None, f"native kernels could not be built: {reasons[-1]}"
