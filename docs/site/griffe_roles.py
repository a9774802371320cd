"""The extension of griffe through which docstrings reach the reference."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import griffe

for _folder in (pathlib.Path(__file__).parents[2], pathlib.Path(__file__).parent):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from site_roles import without_roles  # noqa: E402


class Roles(griffe.Extension):
    """Makes code and links of the roles in every docstring, and shows defaults in full."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with each object once all are there."""
        if obj.docstring is not None:
            obj.docstring.value = without_roles(obj.docstring.value)
        # A dotted name is else shown by its last part alone.
        if isinstance(obj, griffe.Attribute) and isinstance(obj.value, griffe.ExprAttribute):
            obj.value = str(obj.value)
        for parameter in obj.parameters if isinstance(obj, griffe.Function) else ():
            if isinstance(parameter.default, griffe.ExprAttribute):
                parameter.default = str(parameter.default)
