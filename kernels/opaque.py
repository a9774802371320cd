"""Python implementations of operators are no code for ``torch.compile`` to look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


def opaque(implementation: F) -> F:
    """The function itself, which Dynamo from now on leaves alone, and what it calls.

    An operator is one node of a graph, but where a graph breaks in the frame that calls it, Dynamo compiles the next
    Python frame below: this one. Costs nothing when it is called, and nothing is imported; where torch has no such
    switch nothing is done.
    """
    frames: Any = getattr(torch._C._dynamo, "eval_frame", None)
    mark, strategy, action = (
        getattr(frames, n, None) for n in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")
    )
    if mark is not None and strategy is not None and action is not None and hasattr(implementation, "__code__"):
        mark(implementation.__code__, strategy(action.SKIP, action.SKIP))
    return implementation
