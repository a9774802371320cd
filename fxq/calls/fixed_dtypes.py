"""A captured graph computes in the dtypes it was captured with: casting its tensors is refused at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class DtypeError(TypeError):
    """A cast of a captured graph, whose scales are float32 and whose operators name their dtypes."""


class FixedDtypes(nn.Module):
    """Mixin: ``half``, ``double``, ``to(dtype)`` and the like raise :class:`DtypeError`; moving works as always."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        tensors = [*self.parameters(), *self.buffers()]
        for dtype, device in {(tensor.dtype, tensor.device) for tensor in tensors}:
            if (cast := fn(torch.empty(0, dtype=dtype, device=device)).dtype) != dtype:
                raise DtypeError(
                    f"a quantized graph cannot be cast from {dtype} to {cast}: its scales are float32 and its "
                    "operators name the dtypes they were captured with. Cast the float model and quantize that, or "
                    "cast the module that fxq.apply(model, bundle) returns"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
