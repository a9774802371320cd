"""What the commands share: options, and how results go to standard output."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fxq.runtime.streams import emit

SeedOption = Annotated[int, typer.Option(help="Seed of prompts and noise.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def emit_json(data: object) -> None:
    """Write a result to standard output as JSON."""
    emit(json.dumps(data, indent=1))
