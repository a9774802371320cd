"""Names of Wan's tensors, as :mod:`fxq.models.published.names` has them."""

from __future__ import annotations

from fxq.models.published.names import DIFFUSERS, ORIGINAL, OWN, Naming

__all__ = ["DIFFUSERS", "ORIGINAL", "OWN", "Naming"]
