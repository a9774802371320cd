"""Writers and readers of quantized graphs.

Nothing here runs passes of the line, and nothing in a file is executed when it is read.
"""

from __future__ import annotations

from fxq.export import pickled as pickled  # lets modules be pickled
from fxq.export.bundle import read_manifest, save
from fxq.export.capture import ExportError
from fxq.export.contract import Verdict, verify_bundle
from fxq.export.diffusers_folder import save_diffusers
from fxq.export.files import BundleError
from fxq.export.hub.fetch import load
from fxq.export.onnx import check_onnx, export_onnx
from fxq.export.program import export_program, load_program
from fxq.export.receipt import Receipt, read_receipt

__all__ = [
    "BundleError",
    "ExportError",
    "Receipt",
    "Verdict",
    "check_onnx",
    "export_onnx",
    "export_program",
    "load",
    "load_program",
    "read_manifest",
    "read_receipt",
    "save",
    "save_diffusers",
    "verify_bundle",
]

if __name__ != "fxq.export":
    raise ImportError("import fxq.export")
