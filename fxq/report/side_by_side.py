"""Several versions of one video beside each other, with their names and their differences, frame by frame."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fxq.report.video import Frames

GAIN = 4
"""What differences are multiplied by, to be seen."""
_BAR, _SIZE, _GAP = 20, 12, 4
_INK, _PAPER = (235, 238, 240), (20, 23, 26)


def side_by_side(reference: tuple[str, Frames], others: Mapping[str, Frames], scale: int = 1) -> Frames:
    """Full precision | each other version, and under each of these its difference; one other: all three in a row.

    Args:
        reference: name and frames uint8 [F, H, W, 3].
        others: frames of the same shape by name.
        scale: enlargement of pixels; names are not enlarged.

    Returns:
        uint8 [F, rows, columns, 3]. A difference is absolute, times :data:`GAIN`, black where there is none.
    """
    name, frames = reference
    differences = {f"difference of {other} x {GAIN}": _difference(got, frames) for other, got in others.items()}
    first, second = [(name, frames), *others.items()], list(differences.items())
    if len(others) == 1:
        return _row([*first, *second], scale)
    empty = ("", np.zeros_like(frames) + np.array(_PAPER, np.uint8))
    return np.concatenate([_row(first, scale), _row([empty, *second], scale)], axis=1)


def _difference(got: Frames, want: Frames) -> Frames:
    error = np.abs(got.astype(np.int16) - want.astype(np.int16)) * GAIN
    return error.clip(0, 255).astype(np.uint8)


def _row(panels: list[tuple[str, Frames]], scale: int) -> Frames:
    """Panels in a row with a gap between them, each under a bar with its name."""
    made = []
    for i, (name, frames) in enumerate(panels):
        large = frames.repeat(scale, 1).repeat(scale, 2)
        bar = np.broadcast_to(_bar(name, large.shape[2]), (len(large), _BAR, large.shape[2], 3))
        panel = np.concatenate([bar, large], axis=1)
        gap = np.zeros((*panel.shape[:2], _GAP, 3), np.uint8) + np.array(_PAPER, np.uint8)
        made += [gap, panel] if i else [panel]
    return np.concatenate(made, axis=2)


def _bar(name: str, width: int) -> Frames:
    image = Image.new("RGB", (width, _BAR), _PAPER)
    font = ImageFont.load_default(_SIZE)
    while len(name) > 1 and font.getlength(name) > width - 6:
        name = name.removesuffix("…")[:-1] + "…"
    ImageDraw.Draw(image).text((3, 3), name, _INK, font)
    return np.asarray(image)
