"""What is shown of an error in code that a user gave: an adapter, a rollout, a plug-in."""

from __future__ import annotations

import pathlib
import sys
import sysconfig
import traceback
from types import TracebackType

import fxq

_PLACES = [pathlib.Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")]
_OURS = [
    pathlib.Path(fxq.__file__).resolve().parent,
    *(pathlib.Path(module.__file__ or "").resolve().parent for module in (fxq.export, fxq.kernels, fxq.passes)),
    *(pathlib.Path(sys.modules[name].__file__ or "").resolve() for name in ("fxq_command",) if name in sys.modules),
]


def users_part(error: BaseException) -> TracebackType | None:
    """The traceback from the first line that is neither fxq's nor of an installed package; None where there is none."""
    found = error.__traceback__
    while found is not None and not _is_users(found.tb_frame.f_code.co_filename):
        found = found.tb_next
    return found


def _is_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = pathlib.Path(filename).resolve()
    if path == pathlib.Path(sys.argv[0]).resolve():
        return False
    return not any(path == place or place in path.parents for place in (*_PLACES, *_OURS))


def show_users_error(error: BaseException, part: TracebackType) -> None:
    """Print an error of the user's code with its own lines only, its causes included."""
    traceback.print_exception(type(error), error, part)
