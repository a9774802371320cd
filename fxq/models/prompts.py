"""Prompt embeddings that were computed before: from a file, or from a function of the user."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxq.models.archives import read_arrays
from fxq.runtime.reading import ReadError, read_header


class PromptError(ValueError):
    """Prompt embeddings that are missing, misshapen or not finite."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Named prompt embeddings, ``embeddings[i]`` [L_i, text_dim]; padding tokens are zero and never masked."""

    names: tuple[str, ...]
    embeddings: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Sequence[int], text_len: int) -> Tensor:
        """The prompts at ``indices`` padded with zeros: [B, text_len, text_dim].

        Raises:
            PromptError: a prompt longer than ``text_len``.
        """
        for i in indices:
            if (length := self.embeddings[i].shape[0]) > text_len:
                raise PromptError(f"prompt {self.names[i]!r} has {length} tokens, the model takes at most {text_len}")
        rows = [self.embeddings[i] for i in indices]
        return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, text_len - row.shape[0])) for row in rows])


def load_prompts(source: str | pathlib.Path, text_dim: int, text_len: int, count: int = 1, seed: int = 0) -> Prompts:
    """Read prompt embeddings, for Wan those of UMT5-XXL.

    Args:
        source: a ``.safetensors`` or ``.npz`` file of tensors [L, text_dim] (one prompt) or [B, L, text_dim]
            (prompts ``name.0``, ...), or ``package.module:function`` where ``function(count, seed)`` returns a
            tensor [B, L, text_dim], a list of [L, text_dim], or a dict of named ones.
        text_dim: width of the embedding.
        text_len: most tokens a prompt may have; fewer are padded by :meth:`Prompts.batch`.
        count: prompts wanted, told to the function; a file gives all it has.
        seed: told to the function.

    Raises:
        PromptError: nothing there, no floating point, another shape, NaN or infinity.
    """
    path = pathlib.Path(source)
    if path.suffix == ".safetensors":
        named = _read_safetensors(path)
    elif path.suffix == ".npz":
        named = _read_npz(path)
    elif ":" in str(source) and not path.exists():
        named = _named(str(source), load_function(str(source), PromptError, *TAKES)(count, seed))
    else:
        raise PromptError(f"prompts {source}: expected a .safetensors or .npz file, or package.module:function")
    return _checked(str(source), named, text_dim, text_len)


TAKES = "the number of videos", "a seed"
"""What functions of a user's models and prompts are called with."""


def load_function(name: str, error: type[ValueError], *takes: str) -> Callable[..., object]:
    """The function that ``package.module:function`` names, looked up from the working directory too.

    Args:
        name: of the function.
        error: to raise.
        takes: what it is called with, in words, an argument each; none: it is not asked.

    Raises:
        ValueError: of the given type, when there is no such function or it does not take these arguments.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as reason:
        raise error(f"{name!r}: {reason}") from None
    if not callable(found):
        raise error(f"{name!r} is a {type(found).__name__}, expected a function")
    try:
        inspect.signature(found).bind(*takes) if takes else None
    except TypeError as reason:
        raise error(f"{name!r} has to take {' and '.join(takes)}: {reason}") from None
    except ValueError:  # of builtins no signature is known
        pass
    result: Callable[..., object] = found
    return result


def _read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        header = read_header(path)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in header.tensors}
    except (ReadError, SafetensorError, OSError) as error:
        raise PromptError(f"prompts {path} cannot be read: {error}") from error


def _read_npz(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        return read_arrays(path)
    except (OSError, ReadError) as error:
        raise PromptError(f"prompts {path} cannot be read: {error}; expected plain arrays, without objects") from error


def _named(source: str, result: object) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        result = {"prompt": result}
    elif isinstance(result, list | tuple):
        result = {f"prompt.{i}": value for i, value in enumerate(result)}
    if not isinstance(result, Mapping) or not all(isinstance(v, Tensor) for v in result.values()):
        raise PromptError(
            f"prompts {source} returned {type(result).__name__}, expected a tensor, a list of tensors or a dict of them"
        )
    return {str(name): value.detach().cpu() for name, value in result.items()}


def _checked(source: str, named: Mapping[str, Tensor], text_dim: int, text_len: int) -> Prompts:
    names: list[str] = []
    rows: list[Tensor] = []
    for name, tensor in named.items():
        wrong = tensor.ndim not in (2, 3) or tensor.shape[-1] != text_dim or not 1 <= tensor.shape[-2] <= text_len
        if wrong or not tensor.is_floating_point():
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise PromptError(
                f"prompts {source}: {name} is {found}, expected floating point "
                f"[tokens, {text_dim}] or [prompts, tokens, {text_dim}] with 1 to {text_len} tokens"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise PromptError(f"prompts {source}: {name} has NaN or infinity; compute the embedding again")
        parts = list(tensor) if tensor.ndim == 3 else [tensor]
        names += [f"{name}.{i}" for i in range(len(parts))] if tensor.ndim == 3 else [name]
        rows += parts
    if not rows:
        raise PromptError(f"prompts {source}: there is no embedding in it, expected at least one")
    return Prompts(tuple(names), tuple(rows))
