"""fxq: a compiler-style quantizer for autoregressive video diffusion models. The whole API on one screen."""

from __future__ import annotations

__version__ = "0.1.0"

from fxq import cpu  # noqa: F401  first: FXQ_CPU has to reach torch's libraries before they start
from fxq.allocator import keep_memory
from fxq.apply import ApplyError, apply
from fxq.binding import BackendError, Binding, bind
from fxq.calibrate import Batch
from fxq.collect import CalibrationError
from fxq.config import Recipe, RecipeError, Rule, Scheme
from fxq.export import (
    BundleError,
    ExportError,
    check_onnx,
    export_onnx,
    export_program,
    load,
    load_program,
    read_receipt,
    save,
    verify_bundle,
)
from fxq.models.checkpoints import CheckpointError
from fxq.models.prompts import PromptError
from fxq.optimize import optimize
from fxq.passes import OutlierChannels, detect_outliers
from fxq.quantize import quantize, sensitivity
from fxq.recipes import PRESETS, load_recipe
from fxq.record import RecordError, Recording, record
from fxq.rollout import Call, Draws, Rollout, Span, State
from fxq.summary import Summary, summary
from fxq.trace import TraceError
from fxq.workers import WorkerError, launched

__all__ = [
    "PRESETS",
    "ApplyError",
    "BackendError",
    "Batch",
    "Binding",
    "BundleError",
    "CalibrationError",
    "Call",
    "CheckpointError",
    "Draws",
    "ExportError",
    "OutlierChannels",
    "PromptError",
    "Recipe",
    "RecipeError",
    "RecordError",
    "Recording",
    "Rollout",
    "Rule",
    "Scheme",
    "Span",
    "State",
    "Summary",
    "TraceError",
    "WorkerError",
    "apply",
    "bind",
    "check_onnx",
    "detect_outliers",
    "export_onnx",
    "export_program",
    "keep_memory",
    "launched",
    "load",
    "load_program",
    "load_recipe",
    "optimize",
    "quantize",
    "read_receipt",
    "record",
    "save",
    "sensitivity",
    "summary",
    "verify_bundle",
]
