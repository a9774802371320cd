"""Writers and readers of quantized graphs."""

from __future__ import annotations

from fxq.export.bundle import BundleError, load, read_manifest, save

__all__ = ["BundleError", "load", "read_manifest", "save"]

if __name__ != "fxq.export":
    raise ImportError("import fxq.export")
