"""What a GPU benchmark has done so far, one JSON object a line: it outlives a process that a kernel killed.

Kinds of lines: "facts"; "start" of a step; "at": the contestant a step has come to; "done" with data; "skip" with the
reason; "trace": an error in full; "died": the process that wrote the lines before is gone.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

Line = dict[str, Any]


class Journal:
    """The lines of a file; a torn last line is ignored.

    Args:
        path: of the file, made when the first line is written.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        if path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.lines.append(json.loads(text))
                except json.JSONDecodeError:
                    continue

    def write(self, kind: str, **more: Any) -> None:
        """Append a line; it is on disk when this returns."""
        line = {"kind": kind, **more}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)

    def of(self, kind: str) -> list[Line]:
        """Lines of a kind in order."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def facts(self) -> Line:
        """All facts together."""
        return {key: value for line in self.of("facts") for key, value in line.items() if key != "kind"}

    @property
    def finished(self) -> set[str]:
        """Steps that are done or skipped."""
        return {line["step"] for line in self.lines if line["kind"] in ("done", "skip")}

    def killers(self, step: str) -> dict[str, str]:
        """Contestants of a step that took a process with them, and how it died."""
        found, here = {}, ""
        for line in self.lines:
            if line["kind"] in ("start", "at"):
                here = line.get("contestant", "") if line["step"] == step else ""
            elif line["kind"] == "died" and here:
                found[here] = line["why"]
        return found

    def bury(self, why: str) -> None:
        """Note that the writing process died; a step that no contestant is to blame for is not tried again."""
        self.write("died", why=why)
        started = self.of("start")
        last = started[-1]["step"] if started else ""
        if last and last not in self.finished and not self._blamed(last):
            self.write("skip", step=last, why=why)

    def _blamed(self, step: str) -> bool:
        """Whether the last death of a step came while it built a contestant."""
        before = [line for line in self.lines if line["kind"] in ("start", "at")]
        return bool(before) and before[-1]["step"] == step and bool(before[-1].get("contestant"))
