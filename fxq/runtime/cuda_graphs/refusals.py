"""What cannot be replayed from a graph, told before anything is captured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxq.core.aliasing import written_inputs

DEVICE = "cuda"
_HOST = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_BRANCHES = ("cond", "while_loop", "map_impl", "scan")
_CONSTANTS = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_SHOWN = 3
_FEW = 5

Path = tuple[Any, ...]
"""Where a leaf lies in (args, kwargs)."""


class CudaGraphError(ValueError):
    """A module or a call that cannot be replayed from a CUDA graph, or more shapes than were allowed."""


def device_of(module: Callable[..., Any], device: torch.device | str | None) -> torch.device:
    """The GPU that a module lies on, or that a function was said to run on.

    Raises:
        CudaGraphError: when there is none, or more than one.
    """
    # A number on the CPU is read when a kernel is launched, and a graph keeps it.
    tensors = {key: one for key, one in weights_of(module).items() if one.device.type != "cpu" or one.ndim}
    found = {tensor.device for tensor in tensors.values()}
    if device is not None:
        found.add(_indexed(torch.device(device)))
    name = type(module).__name__ if isinstance(module, nn.Module) else getattr(module, "__name__", "the function")
    if not found:
        raise CudaGraphError(
            f"{name} has no tensors that say where it runs: name the GPU, CudaGraphs(..., device='cuda')"
        )
    if away := sorted(str(one) for one in found if one.type != DEVICE):
        example = next((f", such as {key}," for key, tensor in tensors.items() if str(tensor.device) == away[0]), "")
        raise CudaGraphError(
            f"{name}{example} lies on {away[0]} and CUDA graphs are of a GPU: move it with .to('cuda'), or load the "
            "bundle there, fxq.load(folder, 'cuda'); without a GPU call the module itself"
        )
    if len(found) > 1:
        raise CudaGraphError(f"{name} lies on {', '.join(sorted(map(str, found)))}: one graph runs on one GPU")
    return found.pop()


def weights_of(module: Callable[..., Any]) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name; none of a function."""
    return dict((*module.named_parameters(), *module.named_buffers())) if isinstance(module, nn.Module) else {}


def _indexed(device: torch.device) -> torch.device:
    if str(device) == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_module(module: Callable[..., Any]) -> None:
    """Refuse what a graph would replay otherwise than the module computes it.

    Raises:
        CudaGraphError: in training mode; where a captured graph reads a value on the host, branches on one, has sizes
            that depend on data, or writes into its inputs or stored tensors.
    """
    name = type(module).__name__
    if not isinstance(module, fx.GraphModule):  # whose flag says nothing: it computes as it was captured
        if isinstance(module, nn.Module) and module.training:
            raise CudaGraphError(f"{name} is in training mode, which replayed graphs do not follow: call .eval() first")
        return
    for node in module.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if node.op == "call_function" and (
            any(tag in tags for tag in _HOST) or getattr(node.target, "__name__", "") in _BRANCHES
        ):
            raise CudaGraphError(
                f"{name}: {node.name} ({node.target}) needs a value of the GPU on the host (a branch, an .item(), a "
                "size of data), and a replayed graph does not come back to the host: call the module itself"
            )
    if written := sorted(node.name for node in written_inputs(module.graph)):
        raise CudaGraphError(
            f"{name} writes into {', '.join(written[:_SHOWN])}, which a replayed graph would not do to the caller's "
            "tensors: return the new values as outputs"
        )


def readable(leaf: object, device: torch.device) -> bool:
    """Whether a graph can read an input; :func:`refuse` says why not."""
    if isinstance(leaf, Tensor):
        return leaf.device == device and not leaf.requires_grad and leaf.layout == torch.strided
    return leaf is None or isinstance(leaf, _CONSTANTS)


def refuse(name: str, leaf: object, device: torch.device) -> NoReturn:
    """Say why a graph cannot read an input.

    Raises:
        CudaGraphError: it lies on another device, requires grad, is sparse, or is neither a tensor nor a constant.
    """
    if not isinstance(leaf, Tensor):
        why = f"is of type {type(leaf).__name__}: graphs take tensors and constants, in lists, tuples and dicts"
    elif leaf.device != device:
        why = f"lies on {leaf.device} and the module on {device}: move it there"
    elif leaf.requires_grad:
        why = "requires grad, and a replayed graph has no backward pass: detach it, or call the module itself"
    else:
        why = f"is {leaf.layout}: graphs read dense tensors"
    raise CudaGraphError(f"input {name} {why}")


def label(module: Callable[..., Any], path: Path) -> str:
    """An input as its caller knows it: ``prefix_k[0]``."""
    first, rest = path[1], pytree.keystr(path[2:])
    if isinstance(first, pytree.MappingKey):
        return f"{first.key}{rest}"
    try:
        found = inspect.signature(module.forward if isinstance(module, nn.Module) else module).parameters.values()
    except (TypeError, ValueError):  # a function that does not say
        found = {}.values()
    names = [one.name for one in found if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return f"{names[first.idx] if first.idx < len(names) else f'args[{first.idx}]'}{rest}"


def too_many(captures: Sequence[Mapping[str, str]], call: Mapping[str, str], limit: int) -> CudaGraphError:
    """Says which inputs vary.

    Args:
        captures: inputs of the graphs so far, by their names.
        call: those of the call that has no graph.
        limit: that was given.
    """
    varying = dict[str, list[str]]()
    for name, form in call.items():
        forms = list(dict.fromkeys([*(one[name] for one in captures if name in one), form]))
        if len(forms) > 1 or not all(name in one for one in captures):
            varying[name] = forms
    shown = [
        f"{name} ({', '.join(forms[-_FEW:])}{f' and {len(forms) - _FEW} more' if len(forms) > _FEW else ''})"
        for name, forms in list(varying.items())[:_SHOWN]
    ]
    more = f" and {len(varying) - _SHOWN} more inputs" if len(varying) > _SHOWN else ""
    what = f"{', '.join(shown)}{more}" if shown else "the number of inputs, or autocast"
    return CudaGraphError(
        f"{len(captures)} graphs are captured, limit={limit}, and this call needs another one. What varies: {what}. "
        "Raise the limit, give these inputs fewer shapes, or call the module itself"
    )
