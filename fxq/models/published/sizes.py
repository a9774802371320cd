"""Sizes of a Wan that can be seen in the shapes of its tensors: all but the number of heads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

UNSEEN = "num_heads"
"""What the shapes do not show: queries and keys have all heads side by side."""
HEAD = 128
"""Channels of a head in every published Wan."""


def sizes_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, object]:
    """Settings by their official names.

    Args:
        shapes: of the tensors of a Wan by its own names.

    Returns:
        What the shapes show; empty when they are of something else.
    """
    blocks = {found[1] for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    try:
        patch, head = list(shapes["patch_embedding.weight"]), list(shapes["head.head.weight"])
        dim, in_dim, *patch_size = patch
        rows, columns = patch_size[1:]
        return {
            "dim": dim,
            "ffn_dim": next(iter(shapes["blocks.0.ffn.0.weight"])),
            "num_layers": len(blocks),
            "freq_dim": list(shapes["time_embedding.0.weight"])[1],
            "text_dim": list(shapes["text_embedding.0.weight"])[1],
            "in_dim": in_dim,
            "out_dim": head[0] // (rows * columns),
            "patch_size": patch_size,
            "qk_norm": int("blocks.0.self_attn.norm_q.weight" in shapes),
            "cross_attn_norm": int("blocks.0.norm3.weight" in shapes),
        }
    except (KeyError, ValueError, IndexError, StopIteration, ZeroDivisionError):
        return {}
