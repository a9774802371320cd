"""What ranks compare before and while they share a job, so that no rank does another job than the others."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxq.calibration.rollout import Rollout

_PIECE = 16
"""Elements at the start, the middle and the end of a tensor that are looked at."""


def describe_tensor(tensor: Tensor) -> str:
    """Dtype, shape and a digest of a few elements: what differs there is another tensor."""
    text = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if tensor.device.type == "meta" or not tensor.numel() or type(tensor) not in (Tensor, nn.Parameter):
        return text
    flat = tensor.detach()
    flat = flat.view(-1) if flat.is_contiguous() else flat.reshape(len(flat) if flat.ndim else 1, -1)[0]
    places = {0, max(0, (len(flat) - _PIECE) // 2), max(0, len(flat) - _PIECE)}
    digest = hashlib.sha256()
    for start in sorted(places):
        piece = flat[start : start + _PIECE].cpu().contiguous()
        digest.update(piece.view(torch.uint8).numpy().tobytes())
    return f"{text} {digest.hexdigest()[:16]}"


def describe(value: object) -> str:
    """Nested inputs as text: structure, tensors by :func:`describe_tensor`, numbers and text as they are."""
    leaves, spec = pytree.tree_flatten(value)
    told = [
        describe_tensor(leaf)
        if isinstance(leaf, Tensor)
        else repr(leaf)
        if isinstance(leaf, bool | int | float | str | None)
        else type(leaf).__name__
        for leaf in leaves
    ]
    return f"{[str(part) for part in told]} in {hashlib.sha256(str(spec).encode()).hexdigest()[:8]}"


def describe_model(model: object) -> dict[str, str]:
    """Class and tensors of a model by name."""
    if isinstance(model, ExportedProgram):
        return {n: describe_tensor(t) for n, t in model.state_dict.items()}
    if not isinstance(model, nn.Module):
        return {"": type(model).__name__}
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {"class": type(model).__name__} | {name: describe_tensor(tensor) for name, tensor in tensors}


def describe_data(loader: object) -> dict[str, str]:
    """Calibration data as far as it can be looked at without using it up."""
    if loader is None:
        return {"kind": "none"}
    if isinstance(loader, Rollout):
        told = {"kind": type(loader).__name__, "number of batches": str(len(loader.batches))}
        for i, (condition, draws) in enumerate(loader.batches):
            told[f"batch {i}"] = f"{describe(dict(condition))} {_plain(draws)}"
        return told
    if isinstance(loader, Sequence):
        told = {"kind": "a sequence", "number of batches": str(len(loader))}
        return told | {f"batch {i}": describe(_fields(item)) for i, item in enumerate(loader)}
    return {"kind": "an iterable"}


def _fields(item: object) -> object:
    """A batch as something whose tensors can be found."""
    return vars(item) if hasattr(item, "__dict__") and not isinstance(item, Tensor) else item


def _plain(draws: object) -> str:
    return str({k: v for k, v in sorted(getattr(draws, "__dict__", {}).items()) if not k.startswith("_")})


def environment_facts(version: str) -> dict[str, str]:
    """Versions that must be the same on every rank."""
    return {"fxq": version, "torch": torch.__version__}


def flat_facts(data: object, name: str = "") -> dict[str, str]:
    """Leaves of nested JSON values by their path."""
    if isinstance(data, Mapping):
        items: Iterable[tuple[object, object]] = data.items()
    elif isinstance(data, list | tuple):
        items = enumerate(data)
    else:
        return {name: json.dumps(data)}
    found: dict[str, str] = {}
    for key, value in items:
        found |= flat_facts(value, f"{name}.{key}" if name else str(key))
    return found or {name: json.dumps(data)}
