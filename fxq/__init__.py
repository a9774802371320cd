"""fxq: a compiler-style quantizer for autoregressive video diffusion models. The whole API on one screen."""

from __future__ import annotations

import pathlib

if pathlib.Path(__file__).with_name("passes").is_file():
    raise ImportError(
        f"{pathlib.Path(__file__).with_name('passes')} is a file where a link to a folder belongs: this checkout was "
        "made without symbolic links. Run `git config core.symlinks true` and `git checkout -- fxq`; or "
        "`pip install .`, which needs no links"
    )

from fxq import cpu  # noqa: F401  first: FXQ_CPU has to reach torch's libraries before they start
from fxq.calibration.calibrate import Batch
from fxq.calibration.collect import CalibrationError
from fxq.calibration.record import RecordError, Recording, record
from fxq.calibration.rollout import Call, Condition, Draws, OnCall, Rollout, Span, State
from fxq.capture.trace import TraceError
from fxq.core.config import Budget, Recipe, RecipeError, Rule, Scheme
from fxq.core.summary import Summary, summary
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
from fxq.export.diffusers_folder import save_diffusers
from fxq.integrations.binding import BackendError, Binding, bind
from fxq.integrations.registration import register
from fxq.integrations.swap import ApplyError, apply
from fxq.models.checkpoints import CheckpointError
from fxq.models.diffusers_folder import load_folder
from fxq.models.prompts import PromptError
from fxq.optimize import optimize
from fxq.passes import OutlierChannels, detect_outliers
from fxq.presets import PRESETS
from fxq.quantize import quantize, sensitivity
from fxq.recipes import load_recipe
from fxq.runtime.cuda_graphs.refusals import CudaGraphError
from fxq.runtime.cuda_graphs.replay import CudaGraphs
from fxq.runtime.memory.allocator import keep_memory
from fxq.runtime.workers import WorkerError, launched
from fxq.version import __version__ as __version__

__all__ = [
    "PRESETS",
    "ApplyError",
    "BackendError",
    "Batch",
    "Binding",
    "Budget",
    "BundleError",
    "CalibrationError",
    "Call",
    "CheckpointError",
    "Condition",
    "CudaGraphError",
    "CudaGraphs",
    "Draws",
    "ExportError",
    "OnCall",
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
    "load_folder",
    "load_program",
    "load_recipe",
    "optimize",
    "quantize",
    "read_receipt",
    "record",
    "register",
    "save",
    "save_diffusers",
    "sensitivity",
    "summary",
    "verify_bundle",
]
