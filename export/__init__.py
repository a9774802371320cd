"""Writers and readers of quantized graphs."""

from __future__ import annotations

from fxq.export.bundle import load, read_manifest, save
from fxq.export.contract import Verdict, verify_bundle
from fxq.export.files import BundleError
from fxq.export.receipt import Receipt, read_receipt

__all__ = ["BundleError", "Receipt", "Verdict", "load", "read_manifest", "read_receipt", "save", "verify_bundle"]

if __name__ != "fxq.export":
    raise ImportError("import fxq.export")
