"""The command line: thin commands over the library. Exit codes: 0 done, 1 refused with a reason, 2 wrong usage.

Nothing here measures or decides, and nothing below imports it. ``fxq_command`` lists the commands.
"""

from __future__ import annotations

import sys
from typing import Any

from fxq.calibration.collect import CalibrationError
from fxq.calibration.record import RecordError
from fxq.capture.trace import TraceError
from fxq.cli.options.models import AdapterError
from fxq.cli.user_code import show_users_error, users_part
from fxq.comparison.methods import ComparisonError
from fxq.core.config import RecipeError
from fxq.core.pipeline import PassError
from fxq.core.verify import RuleError
from fxq.export import BundleError, ExportError
from fxq.models.checkpoints import CheckpointError
from fxq.models.prompts import PromptError
from fxq.passes import LoweringError
from fxq.plugins import PluginError
from fxq.runtime.cuda_graphs.refusals import CudaGraphError
from fxq.runtime.streams import finish_output, stderr_console
from fxq.runtime.workers import WorkerError
from fxq_command import app

_REFUSALS = (
    AdapterError,
    BundleError,
    CalibrationError,
    CheckpointError,
    CudaGraphError,
    ComparisonError,
    ExportError,
    LoweringError,
    OSError,
    PassError,
    PluginError,
    PromptError,
    RecipeError,
    RecordError,
    RuleError,
    TraceError,
    WorkerError,
)


def main() -> None:
    """Entry point: refusals become one line on stderr and exit code 1, errors of a user's code their own traceback."""
    code: Any = 0
    try:
        app()
    except SystemExit as error:
        code = error.code
    except BrokenPipeError:
        code = 1
    except _REFUSALS as error:
        console = stderr_console()
        console.print(f"[bold red]refused[/]: {type(error).__name__}: ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        code = 1
    except Exception as error:
        part = users_part(error)
        if part is None:
            raise
        show_users_error(error, part)
        code = 1
    sys.exit(code if finish_output() else 1)
