"""Metrics that others bring, such as LPIPS, FVD and VBench: their networks' weights are not fxq's to ship."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType

import numpy as np

from fxq import plugins
from fxq.comparison.bundles.contestant import folder_name
from fxq.comparison.methods import ComparisonError
from fxq.models.prompts import load_function
from fxq.report.video import Frames

USUAL = ("LPIPS", "FVD", "VBench")
"""Those that people ask for; a report says which of them it lacks."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A video and full precision's of the same prompt and noise, frames uint8 [F, H, W, 3] each."""

    prompt: str
    frames: Frames
    reference: Frames


Measure = Callable[[Iterable[Pair]], float]
"""A metric: of all pairs of one version, which it can go through once, one number."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A named metric and where it comes from."""

    name: str
    source: str
    measure: Measure

    def __call__(self, pairs: Iterable[Pair], version: str) -> float:
        """Its number; NaN is one.

        Raises:
            ComparisonError: when it gives something else. What it raises itself is not caught.
        """
        value = self.measure(pairs)
        try:
            return math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise ComparisonError(
                f"metric {self.name!r} ({self.source}) gave {type(value).__name__} for {version}, expected a number"
            ) from None


def find_metrics(words: Sequence[str]) -> list[Metric]:
    """Metrics by the words of ``--metric``: a plug-in's name, or ``NAME=package.module:function``.

    Raises:
        ComparisonError: a name twice, or one that leads to nothing.
        PluginError: when a plug-in cannot be used.
    """
    found: list[Metric] = []
    for word in words:
        name, equals, target = word.partition("=")
        if equals:
            found.append(Metric(name, target, load_function(target, ComparisonError)))  # type: ignore[arg-type]
            continue
        plugin = plugins.find(plugins.METRICS, name, ())
        if plugin is None:
            known = ", ".join(plugins.names(plugins.METRICS)) or "none is installed"
            raise ComparisonError(
                f"metric {name!r}: no plug-in has this name ({known}); or say {name}=package.module:function, a "
                "function of fxq.comparison.bundles.metrics.Pair items that returns a number"
            )
        found.append(Metric(name, str(plugin), plugin.load()))
    if len({metric.name for metric in found}) < len(found):
        raise ComparisonError(f"metrics {', '.join(metric.name for metric in found)}: expected each once")
    return found


class KeptFrames:
    """Frames of every version of every video, on disk as they come and gone at the end, for metrics to go through."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=".frames-", dir=folder))
        self._pieces: dict[tuple[str, int], list[pathlib.Path]] = {}
        self.prompts: list[str] = []

    def __enter__(self) -> KeptFrames:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, prompt: str) -> None:
        """Another video."""
        self.prompts.append(prompt)

    def add(self, version: str, frames: Frames) -> None:
        """Further frames uint8 [F, H, W, 3] of the current video."""
        pieces = self._pieces.setdefault((version, len(self.prompts) - 1), [])
        path = self.folder / f"{folder_name(version)}-{len(self.prompts)}-{len(pieces)}.npy"
        np.save(path, frames)
        pieces.append(path)

    def _video(self, version: str, number: int) -> Frames:
        return np.concatenate([np.load(path, allow_pickle=False) for path in self._pieces[version, number]])

    def pairs(self, version: str, reference: str) -> Iterator[Pair]:
        """The videos of one version beside those of another, one in memory at a time."""
        for number, prompt in enumerate(self.prompts):
            yield Pair(prompt, self._video(version, number), self._video(reference, number))
