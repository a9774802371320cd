"""Bytes of the tensors that code makes, counted where they are made."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered: ``largest`` storage that is made, and ``peak`` of all that are alive at a time, in bytes.

    Views of what an operator is given count nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count what it makes."""
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (place := tensor.untyped_storage()).data_ptr() not in given:
                self.largest = max(self.largest, place.nbytes())
                self._hold(tensor, place.nbytes())
        return result

    def _hold(self, tensor: Tensor, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self.live -= size

        weakref.finalize(tensor.untyped_storage(), gone)
