"""What a quantization is expected to need: memory, disk and time, for a person and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class JobEstimate:
    """What a job is expected to need.

    Attributes:
        ram: bytes by phase; phases follow each other, so the largest counts.
        ram_with_folder: bytes of the worst phase if a checkpoint directory is used.
        disk: bytes by file or folder.
        time: seconds by phase.
        ram_total: of the machine.
        disk_free: in the emptiest place that is written to, less what is written there; negative when it does not fit.
        assumptions: what the numbers rest on.
    """

    ram: Mapping[str, int]
    ram_with_folder: int
    disk: Mapping[str, int]
    time: Mapping[str, float]
    ram_total: int
    disk_free: int
    assumptions: tuple[str, ...]

    @property
    def ram_bytes(self) -> int:
        """Memory of the worst phase."""
        return max(self.ram.values())

    @property
    def disk_bytes(self) -> int:
        """All that is written."""
        return sum(self.disk.values())

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(self.time.values())

    def warnings(self) -> list[str]:
        """What will not fit, and what to do about it."""
        found = []
        if self.ram_bytes > 0.9 * self.ram_total:
            phase = max(self.ram, key=self.ram.__getitem__)
            remedy = "use a checkpoint directory and smaller videos, or fewer rows (max_rows in the recipe)"
            if self.ram_with_folder <= 0.9 * self.ram_total:
                remedy = f"with a checkpoint directory it is about {_gb(self.ram_with_folder)}"
            found.append(f"memory is short: {phase} needs about {_gb(self.ram_bytes)}; {remedy}")
        if self.disk_free < 0:
            parts = ", ".join(f"{name} {_gb(size)}" for name, size in self.disk.items())
            found.append(f"the disk is short by {_gb(-self.disk_free)} ({parts}); choose another place")
        return found

    def lines(self) -> list[str]:
        """A few lines for a person: the totals, what takes longest, warnings."""
        longest = max(self.time, key=self.time.__getitem__)
        share = self.time[longest] / self.seconds if self.seconds else 0.0
        parts = " and ".join(f"{_gb(size)} {name}" for name, size in self.disk.items())
        return [
            f"estimate: {_gb(self.ram_bytes)} of RAM (of {_gb(self.ram_total)}), disk {parts}, "
            f"{duration(self.seconds)}; {longest} is {share:.0%} of it",
            *(f"warning: {text}" for text in self.warnings()),
        ]

    def to_json(self) -> dict[str, object]:
        """Everything as JSON values."""
        totals = {"ram_bytes": self.ram_bytes, "disk_bytes": self.disk_bytes, "seconds": self.seconds}
        return totals | asdict(self) | {"warnings": self.warnings()}


def duration(seconds: float) -> str:
    """A time in words of one unit: "40 s", "12 min", "3.5 h", "2.1 days"."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{1 if unit == 3600 else 0}f} {name}"
    return f"{seconds / 86400:.1f} days"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e8 else f"{size / 1e6:.1f} MB"
