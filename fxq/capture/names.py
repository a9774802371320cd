"""Names of modules and tensors that the code of a captured graph cannot say."""

from __future__ import annotations

import keyword

from torch import nn

_QUOTING = "\"'\\"


def unsayable_name(model: nn.Module) -> str:
    """What is wrong with the first name that no graph can have, and what to do; empty when all can.

    Code reads a tensor as ``self.blocks.0.weight``: a part that is a word of Python, or ``forward``, which graphs have
    themselves, or that has a quote, a backslash or an unprintable character cannot stand there.
    """
    named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
    for name, _ in named:
        for part in name.split("."):
            if keyword.iskeyword(part) or part == "forward" or not part.isprintable() or set(part) & set(_QUOTING):
                return (
                    f"{name!r} has {part!r} in its name, which the code of a graph cannot say; rename it in the model, "
                    f"and in its state dict, for example to {_harmless(part)!r}"
                )
    return ""


def _harmless(part: str) -> str:
    kept = "".join(c if c.isprintable() and c not in _QUOTING else "_" for c in part)
    return f"{kept}_" if kept == part else kept
