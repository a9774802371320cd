"""Prompts of the shipped model, in words."""

from __future__ import annotations

import torch

from fxq.cli.models import AdapterError
from fxq.metrics import sprites
from fxq.runtime.messages import did_you_mean


def parse_prompt(text: str) -> torch.Tensor:
    """Word indices int64 [1, 7] of a prompt of the sprite world, such as ``ring red right slow black row1 column2``.

    Raises:
        AdapterError: when a field has no word or two.
    """
    words = text.split()
    indices = []
    for field, known in sprites.WORDS.items():
        hits = [known.index(word) for word in words if word in known]
        if len(hits) != 1:
            stray = [w for w in words if not any(w in k for k in sprites.WORDS.values())]
            hint = did_you_mean(stray[0], known, 0.6) if stray else ""
            hint = f"; for {stray[0]!r} {hint}" if hint else ""
            raise AdapterError(f"prompt {text!r} needs exactly one {field} of: {', '.join(known)}{hint}")
        indices.append(hits[0])
    return torch.tensor([indices])
