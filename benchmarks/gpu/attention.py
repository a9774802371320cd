"""Attention to a growing cache, alone: torch's kernels, and SageAttention or FlashAttention-3 where installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention8 import stored
from benchmarks.gpu.problems import Sizes
from benchmarks.gpu.session import Entry, Session
from fxq import kernels

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [B, S, heads, head_dim] -> [B, S, heads, head_dim]."""

SDPA = "torch SDPA"
SAGE, FLASH3 = "SageAttention", "FlashAttention-3"
PACKAGES = {SAGE: "sageattention", FLASH3: "flash_attn_interface"}
IN_8_BITS = {"int8": 30.0, "int8_fp8": 25.0}
"""Least signal-to-noise ratio of attentions in 8 bits on normal numbers, in decibels."""
LEAST = {SAGE: 20.0, FLASH3: 35.0}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's choice."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CuDNN's kernel, which torch does not choose by itself."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def optional(name: str) -> Attend:
    """The function of an optional package.

    Raises:
        ImportError: when it is not installed.
    """
    module: Any = importlib.import_module(PACKAGES[name])
    if name == SAGE:
        return cast(Attend, partial(module.sageattn, tensor_layout="NHD", is_causal=False))

    def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = module.flash_attn_func(q, k, v)
        return cast(Tensor, result[0] if isinstance(result, tuple) else result)

    return flash3


def _late(name: str, run: Callable[[Attend], Callable[[], Any]]) -> Callable[[], Any]:
    return run(optional(name))


def run_attention(session: Session, sizes: Sizes) -> None:
    """A chunk's queries against the keys of the first, a middle and the last chunk."""
    rows, heads = sizes.rows[0], sizes.config.num_heads
    shape = (heads, sizes.config.head_dim)

    def work(step: str, keys: int) -> dict[str, Any]:
        q, k, v = (torch.randn(1, length, *shape, device=session.device).bfloat16() for length in (rows, keys, keys))
        pieces = ([k[:, : keys - rows], k[:, keys - rows :]], [v[:, : keys - rows], v[:, keys - rows :]])
        picked = slice(0, rows, max(1, rows // 64))

        def run(attend: Attend) -> Callable[[], Any]:
            return lambda: attend(q, k, v)

        def fused(op: kernels.Op) -> Callable[[], Any]:
            return lambda: op(q, *pieces).unflatten(-1, shape)

        entries = [
            Entry(SDPA, lambda: run(sdpa), "bfloat16"),
            Entry("torch SDPA, cuDNN", lambda: run(cudnn), "bfloat16"),
            Entry(
                "fxq::attention, cache and new keys",
                lambda: fused(kernels.attention),
                "bfloat16",
                uses=("attention",),
            ),
            *(
                Entry(
                    f"fxq::{op.name}, cache and new keys",
                    partial(fused, op),
                    "int8",
                    uses=(op.name,),
                    bound=IN_8_BITS[scheme],
                )
                for scheme, op in kernels.ATTENTIONS.items()
            ),
        ]
        if keys > rows:
            kept = stored(q, k, v, keys - rows)
            entries.append(
                Entry(
                    "fxq::attention_packed, stored integers and new keys",
                    lambda: lambda: kernels.attention_packed(*kept).unflatten(-1, shape),
                    "int8",
                    uses=("attention_packed",),
                    bound=IN_8_BITS["int8"],
                )
            )
        for name, package in PACKAGES.items():
            entries.append(Entry(name, partial(_late, name, run), bound=LEAST[name], needs=package))
        flop = 4.0 * rows * keys * sizes.config.dim
        reference = partial(sdpa, q[:, picked].double(), k.double(), v.double())
        return session.contest(step, reference, entries, (SDPA,), lambda y: y[:, picked], {"flop": flop})

    for chunk in (sizes.chunks, (sizes.chunks + 1) // 2, 1):
        keys = chunk * rows
        session.step("attention", f"M{rows} L{keys}", partial(work, keys=keys))
