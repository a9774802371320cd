"""Equivalent rewritings of the float graph that make layers easier to quantize: what a recipe's ``transforms`` name.

Each of them keeps what the model computes, up to rounding, and adds ordinary aten operators to it, which run in model
dtype in every export. Nothing here changes a layer that is kept in model dtype, or chooses integers.
"""

from __future__ import annotations

if __name__ != "fxq.passes.transforms":
    raise ImportError("import fxq.passes.transforms")
