"""Where in a model's code something happened, as ``file.py:line`` with the source line."""

from __future__ import annotations

import functools
import linecache
import pathlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TORCH = str(pathlib.Path(torch.__file__).parent)
_PYTHON, _PACKAGES = sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]
_QUOTED = re.compile(r'File "([^"]+)", line (\d+)')


def place(file: str, line: int) -> str:
    """Text of a place: the last part of the file's path, the line and what stands there."""
    return f"{pathlib.Path(file).name}:{line} `{linecache.getline(file, line).strip()}`"


@functools.lru_cache(maxsize=4096)
def is_model_code(file: str) -> bool:
    """Whether a file is neither torch's, Python's own, nor generated."""
    library = file.startswith(_TORCH) or (file.startswith(_PYTHON) and not file.startswith(_PACKAGES))
    return not library and pathlib.Path(file).is_file()


def _below_torch(trace: TracebackType | None) -> Iterator[tuple[str, int]]:
    """Frames of model code that torch called, outermost first."""
    inside = False
    for frame, line in traceback.walk_tb(trace):
        file = frame.f_code.co_filename
        inside = inside or file.startswith(_TORCH)
        if inside and is_model_code(file):
            yield file, line


def quoted_place(text: str) -> str:
    """The innermost place of model code that a text quotes as Python's tracebacks do, or ""."""
    found = [(file, int(line)) for file, line in _QUOTED.findall(text) if is_model_code(file)]
    return place(*found[-1]) if found else ""


def place_of(error: BaseException) -> str:
    """The innermost place of model code in an error's tracebacks, else in its text, or ""."""
    found: list[tuple[str, int]] = []
    link: BaseException | None = error
    while link is not None:
        found += _below_torch(link.__traceback__)
        link = link.__cause__ or link.__context__
    return place(*found[-1]) if found else quoted_place(str(error))


class DataAccesses(TorchFunctionMode):
    """Notes where code in the block reads ``tensor.data``: writes through it are lost when a model is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        """Run the call; a read of ``data`` is noted with the line of its caller."""
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            caller = sys._getframe(1)
            noted = place(caller.f_code.co_filename, caller.f_lineno)
            if is_model_code(caller.f_code.co_filename) and noted not in self.places:
                self.places.append(noted)
        return func(*args, **(kwargs or {}))
