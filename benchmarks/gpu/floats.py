"""The bfloat16 model with an attention other than torch's own choice: cuDNN's kernel, or FlashAttention-3."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

from torch import Tensor

from benchmarks.gpu.attention import FLASH3, PACKAGES, cudnn, optional
from fxq.bench import problems
from fxq.models import causal_wan

COMPILED = "bf16 compiled"
CUDNN = "cuDNN attention"
NEEDS = {"": "", CUDNN: "", FLASH3: PACKAGES[FLASH3]}
"""Attentions of compiled contestants, "" for torch's choice, with the package that each needs."""

Flat = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [B, S, heads, head_dim] -> [B, S, heads * head_dim]."""


def compiled_name(attention: str, graph: bool) -> str:
    """As "bf16 compiled, cuDNN attention, CUDA graph"."""
    return ", ".join(part for part in (COMPILED, attention, "CUDA graph" if graph else "") if part)


@functools.cache
def flat_attention(name: str) -> Flat:
    """One function for a name: compiled code is kept for the function that it was made with.

    Raises:
        ImportError: when its package is not installed.
    """
    attend = cudnn if name == CUDNN else optional(name)

    def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v).flatten(2)

    return flat


@contextlib.contextmanager
def attending(name: str) -> Iterator[None]:
    """Models run this attention; torch's choice for ""."""
    with contextlib.ExitStack() as stack:
        if name:
            for module in (causal_wan, problems):
                stack.enter_context(mock.patch.object(module, "attention", flat_attention(name)))
        yield
