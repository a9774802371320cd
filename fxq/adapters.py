"""Models by name for the command line: the shipped one, or a user's function that returns a rollout."""

from __future__ import annotations

import importlib
import os
import sys

from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny
from fxq.rollout import Rollout


class AdapterError(ValueError):
    """A model name that leads to no rollout."""


def make_rollout(name: str, videos: int, seed: int) -> Rollout:
    """The rollout a name stands for.

    Args:
        name: ``tiny``, or ``package.module:function`` where ``function(videos, seed)`` returns a :class:`fxq.Rollout`.
        videos: number of videos to drive.
        seed: of prompts and noise.

    Raises:
        AdapterError: when the name leads to nothing or to something else.
    """
    if name == "tiny":
        return tiny_rollout(load_tiny(), videos, seed=seed, unseen=False)[0]
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise AdapterError(
            f"unknown model {name!r}: expected 'tiny' or 'package.module:function' returning a fxq.Rollout"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise AdapterError(f"model {name!r}: {error}") from None
    rollout = function(videos, seed)
    if not isinstance(rollout, Rollout):
        raise AdapterError(f"model {name!r} returned {type(rollout).__name__}, expected a fxq.Rollout")
    return rollout
