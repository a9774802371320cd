"""Versions and machine behind a result."""

from __future__ import annotations

import pathlib
import platform

import torch

from fxq.version import __version__


def environment() -> dict[str, str]:
    """Versions and machine, as stored in manifests and result files."""
    return {
        "fxq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
