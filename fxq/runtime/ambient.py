"""What a caller may have set for the whole process or thread and that must not reach fxq's own work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_tensors() -> Iterator[None]:
    """While the block runs new tensors lie on the CPU, are no inference tensors, and autocast changes nothing.

    Whatever ``torch.set_default_device``, ``torch.inference_mode`` and ``torch.autocast`` say outside. A user's model
    that makes tensors of its own must not run in it: it may need the default device.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(without_autocast())
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """While the block runs autocast changes nothing, on any device that is there."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
