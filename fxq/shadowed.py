"""Names of other packages that fxq's own folders have in a checkout.

With a checkout's root on the path ``kernels`` is found there, and transformers, which asks for the package of that
name, would import it to learn its version.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys

import fxq.kernels

_NAME = "kernels"


@functools.cache
def answer_transformers() -> None:
    """Have transformers find out that the package ``kernels`` is not there, where it would find fxq's folder instead.

    It asks once a process, on its first use. Call this before the first import of diffusers or transformers; elsewhere
    than beside a checkout, and without transformers, nothing happens.
    """
    if importlib.util.find_spec("transformers") is None or not _shadowed():
        return
    sys.modules[_NAME] = None  # type: ignore[assignment]
    try:
        from transformers.utils import import_utils

        if (ask := getattr(import_utils, "is_kernels_available", None)) is not None:
            ask()
    finally:
        del sys.modules[_NAME]


def _shadowed() -> bool:
    """Whether the name leads to fxq's folder."""
    found = None if _NAME in sys.modules else importlib.util.find_spec(_NAME)
    if found is None or found.origin is None or not os.path.isfile(found.origin):
        return False
    return os.path.samefile(found.origin, str(fxq.kernels.__file__))
