"""Versions and machine behind a result."""

from __future__ import annotations

import platform

import torch

from fxq import cpu
from fxq.version import __version__


def environment() -> dict[str, str]:
    """Versions and machine, as stored in manifests and result files."""
    return {
        "fxq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": cpu.name(),
        "threads": str(torch.get_num_threads()),
    }
