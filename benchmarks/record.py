"""What a benchmark leaves: JSON that says how, when and where it was made."""

from __future__ import annotations

import datetime
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping

from fxq.environment import environment


def write(out: pathlib.Path, content: Mapping[str, object], **facts: object) -> None:
    """Write the command of this process, the date, the machine with ``facts`` about it, and ``content``."""
    name = pathlib.Path(sys.argv[0]).stem
    head = {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "environment": environment() | facts,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(head | dict(content), indent=1) + "\n", encoding="utf-8")
