"""Facts about this machine: versions, processors, compiler. Reading them changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass

import torch

from fxq import cpu
from fxq.kernels.native.build import SETS, compiler
from fxq.planning.gpus import GIB

OPTIONAL = {
    "triton": ("triton", "GPU kernels"),
    "diffusers": ("wan", "diffusers transformers and schedulers, VAEs"),
    "transformers": ("wan", "prompts in words"),
    "av": ("video", "videos as .mp4"),
    "uvicorn": ("play", "fxq play"),
    "huggingface-hub": ("hub", "bundles by their name on the hub"),
    "onnx": ("onnx", "ONNX files"),
    "onnxscript": ("onnx", "ONNX files"),
    "onnxruntime": ("onnx", "running ONNX files, a contestant of fxq bench"),
    "torchao": ("bench", "a contestant of fxq bench"),
    "openvino": ("bench", "a contestant of fxq bench"),
}
"""Packages that are not needed: the extra that brings each, and what it is for."""


@dataclass(frozen=True)
class Device:
    """A GPU that torch sees: its name as the driver spells it, architecture as "sm_89" and bytes of memory."""

    name: str
    arch: str
    memory: int


@dataclass(frozen=True)
class Environment:
    """This machine. Empty strings stand for what is not there; ``packages`` has None for what is not installed."""

    python: str
    system: str
    torch: str
    cuda: str
    driver: str
    devices: tuple[Device, ...]
    cpu: str
    cores: int
    threads: int
    instructions: tuple[str, ...]
    missing_instructions: tuple[str, ...]
    limited_to: str
    compiler: str
    packages: dict[str, str | None]

    def lines(self) -> list[tuple[str, str]]:
        """(what, value) for a person."""
        gpus = [f"{gpu.name}, {gpu.arch}, {gpu.memory / GIB:.1f} GiB" for gpu in self.devices]
        lacks = f"; lacks {', '.join(self.missing_instructions)}" if self.missing_instructions else ""
        lacks += f"; limited by {cpu.LIMIT}={self.limited_to}" if self.limited_to else ""
        found = [f"{name} {version}" for name, version in self.packages.items() if version]
        absent = dict[str, list[str]]()
        for name in (name for name, version in self.packages.items() if not version):
            extra, purpose = OPTIONAL[name]
            absent.setdefault(extra, []).append(f"{name} ({purpose})")
        missing = "\n".join(f"pip install 'fxq[{extra}]': {', '.join(names)}" for extra, names in absent.items())
        return [
            ("system", f"{self.system}, Python {self.python}"),
            ("torch", f"{self.torch}, built for {f'CUDA {self.cuda}' if self.cuda else 'CPU'}"),
            ("GPU", "; ".join(gpus) or "none that torch sees"),
            ("driver", self.driver or "none found"),
            ("CPU", f"{self.cpu}, {self.cores} cores, torch uses {self.threads}"),
            ("CPU instructions", (", ".join(self.instructions) or "none that are used") + lacks),
            ("C++ compiler", self.compiler or "none: install g++ or set CXX"),
            ("packages", ", ".join(found) or "none of the optional ones"),
            ("not installed", missing or "nothing"),
        ]


def read_environment() -> Environment:
    """Look at this machine."""
    used = tuple(dict.fromkeys(name for found in reversed(SETS) for name in found.needs))
    lacking = cpu.missing(used)
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        driver=_first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        devices=_devices(),
        cpu=cpu.name() or platform.machine(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        instructions=tuple(name for name in used if name not in lacking),
        missing_instructions=lacking,
        limited_to=cpu.limit(),
        compiler=_compiler(),
        packages={name: _version(name) for name in OPTIONAL},
    )


def _devices() -> tuple[Device, ...]:
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        found.append(Device(properties.name, arch, properties.total_memory))
    return tuple(found)


def _compiler() -> str:
    path = compiler()
    return f"{path}: {_first_line([*shlex.split(path), '--version']) or 'does not run'}" if path else ""


def _first_line(command: list[str]) -> str:
    """First line that a command prints, "" where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
