"""The sprite world of the shipped tiny model: renderer, prompt words and an independent scorer.

A video shows one 8x8 sprite moving at constant velocity on a 20x20 torus over one of three backgrounds. The
prompt names shape, colour, direction, speed, background and start cell; the sprite's offset inside the cell
is left to the noise. The scorer never sees the model: it searches every shape, colour and position by exact
template correlation.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from fxq.models.prompts import PromptError
from fxq.runtime.messages import did_you_mean

SIZE, FRAMES, CELL = 20, 21, 4
WORDS: dict[str, tuple[str, ...]] = {
    "shape": ("ring", "cross", "triangle", "ell", "tee", "bars"),
    "colour": ("red", "green", "blue", "yellow", "magenta", "white"),
    "direction": ("right", "down", "left", "up"),
    "speed": ("slow", "fast"),
    "background": ("black", "dawn", "dusk"),
    "row": ("row0", "row1", "row2", "row3", "row4"),
    "column": ("column0", "column1", "column2", "column3", "column4"),
}
FIELDS = tuple(WORDS)
COUNTS = tuple(len(words) for words in WORDS.values())
VOCABULARY = sum(COUNTS)
TEXT_DIM = 32

_ROWS = (
    "11111111 11111111 11000011 11000011 11000011 11000011 11111111 11111111",
    "00011000 00011000 00011000 11111111 11111111 00011000 00011000 00011000",
    "10000000 11000000 11100000 11110000 11111000 11111100 11111110 11111111",
    "11100000 11100000 11100000 11100000 11100000 11111111 11111111 11111111",
    "11111111 11111111 11111111 00111100 00111100 00111100 00111100 00111100",
    "11100111 11100111 11100111 11100111 11100111 11100111 11100111 11100111",
)
SHAPES = torch.tensor([[[float(c) for c in row] for row in rows.split()] for rows in _ROWS], dtype=torch.float32)
COLOURS = torch.tensor(
    [[1, 0.2, 0.2], [0.2, 1, 0.2], [0.3, 0.5, 1], [1, 1, 0.2], [1, 0.3, 1], [0.95, 0.95, 0.95]], dtype=torch.float32
)
_RAMP = 0.35 * torch.linspace(0, 1, SIZE, dtype=torch.float32)
BACKGROUNDS = torch.stack(
    [torch.zeros(SIZE, SIZE, dtype=torch.float32), _RAMP[:, None].expand(SIZE, SIZE), _RAMP[None].expand(SIZE, SIZE)]
)
_STEP = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])
_TEMPLATES = torch.zeros(len(SHAPES), SIZE, SIZE, dtype=torch.float32)
_TEMPLATES[:, :8, :8] = SHAPES


def velocity(conditions: Tensor) -> Tensor:
    """Pixels per frame (dy, dx), int64 [B, 2]: 2 for slow and 4 for fast in the asked direction."""
    return _STEP[conditions[:, 2]] * (2 * (conditions[:, 3] + 1)).unsqueeze(1)


def held_out(conditions: Tensor) -> Tensor:
    """Which conditions are kept from training, bool [B]: one eighth of all word combinations, by hash."""
    return torch.tensor([hashlib.sha256(bytes(row)).digest()[0] < 32 for row in conditions.tolist()])


def sample_conditions(count: int, generator: torch.Generator, *, unseen: bool) -> Tensor:
    """Random word indices, int64 [count, 7] in the order of ``FIELDS``, all held out or none."""
    rows: list[Tensor] = []
    while sum(len(r) for r in rows) < count:
        drawn = torch.stack([torch.randint(n, (max(64, 2 * count),), generator=generator) for n in COUNTS], 1)
        rows.append(drawn[held_out(drawn) == unseen])
    return torch.cat(rows)[:count]


def prompt_embeds(conditions: Tensor) -> Tensor:
    """One-hot word vectors scaled to unit variance, float32 [B, 7, 32]."""
    offsets = torch.tensor([sum(COUNTS[:i]) for i in range(len(COUNTS))])
    return torch.nn.functional.one_hot(conditions + offsets, TEXT_DIM).float() * TEXT_DIM**0.5


def describe(condition: Tensor) -> str:
    """The prompt in words."""
    return " ".join(WORDS[field][int(i)] for field, i in zip(FIELDS, condition, strict=True))


def parse(text: str) -> Tensor:
    """Word indices int64 [1, 7] of a prompt such as ``ring red right slow black row1 column2``, in any order.

    Raises:
        PromptError: when a field has no word or two.
    """
    words = text.split()
    indices = []
    for field, known in WORDS.items():
        hits = [known.index(word) for word in words if word in known]
        if len(hits) != 1:
            stray = [word for word in words if not any(word in k for k in WORDS.values())]
            hint = did_you_mean(stray[0], known, 0.6) if stray else ""
            hint = f"; for {stray[0]!r} {hint}" if hint else ""
            raise PromptError(f"prompt {text!r} needs exactly one {field} of: {', '.join(known)}{hint}")
        indices.append(hits[0])
    return torch.tensor([indices])


def render(conditions: Tensor, generator: torch.Generator, frames: int = FRAMES) -> Tensor:
    """Clips of the asked prompts, float32 [B, frames, 3, 20, 20] in -1..1.

    The prompt leaves open whether the sprite starts at the left edge of its cell or two pixels to the right.
    """
    batch = len(conditions)
    offset = torch.stack(
        (torch.zeros(batch, dtype=torch.int64), 2 * torch.randint(2, (batch,), generator=generator)), dim=1
    )
    start = conditions[:, 5:7] * CELL + offset
    # [B, frames, 2] in pixels (y, x) of the sprite's upper left corner; the world is a torus
    position = (start[:, None] + velocity(conditions)[:, None] * torch.arange(frames)[None, :, None]) % SIZE
    axis = torch.arange(SIZE)
    # [B, frames, SIZE]: which row and column of the template each row and column of the picture shows
    rows = (axis - position[..., :1]) % SIZE
    columns = (axis - position[..., 1:]) % SIZE
    shape = _TEMPLATES[conditions[:, 0]]  # [B, SIZE, SIZE]
    index = torch.arange(batch)[:, None, None, None]
    # [B, frames, 1, SIZE, SIZE], 1 where the sprite is; colour and background broadcast to the three channels
    mask = shape[index, rows[..., :, None], columns[..., None, :]].unsqueeze(2)
    colour = COLOURS[conditions[:, 1]][:, None, :, None, None]
    background = BACKGROUNDS[conditions[:, 4]][:, None, None]
    return (mask * colour + (1 - mask) * background) * 2 - 1


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the scorer saw, per video: bool [B] each, and the share of exact frame steps, float [B].

    ``motion`` is True when the best of the eight velocities is the asked one and at least 80 % of the frames
    lie within one pixel of that straight track.
    """

    shape: Tensor
    colour: Tensor
    motion: Tensor
    exact_steps: Tensor

    def means(self) -> dict[str, float]:
        """Share of correct videos (and of exact steps) as plain floats."""
        return {f.name: getattr(self, f.name).float().mean().item() for f in dataclasses.fields(self)}


def score(videos: Tensor, conditions: Tensor) -> Scores:
    """Read shape, colour and motion off videos [B, F, 3, 20, 20] and compare with the prompts [B, 7].

    Every shape, colour and position is tried: with background b and colour c, placing a template saves
    ``sum over its pixels of (x - b)^2 - (x - c)^2``; the best saving over the whole video names shape and
    colour, per-frame maxima of the winner give the track.
    """
    x = (videos.clamp(-1, 1) + 1) / 2  # [B, F, 3, SIZE, SIZE] in 0..1
    batch, frames = x.shape[:2]
    background = BACKGROUNDS[conditions[:, 4]][:, None, None]
    # Correlation with a template at every position is a product of spectra: [shapes, SIZE, SIZE / 2 + 1].
    spectra = torch.fft.rfft2(_TEMPLATES).conj()
    saving = []
    for colour in COLOURS:
        # [B, F, SIZE, SIZE]: squared error that a pixel saves by having the sprite's colour instead of the ground's
        gain = ((x - background).square() - (x - colour[None, None, :, None, None]).square()).sum(2)
        spectrum = torch.fft.rfft2(gain)
        saving.append(torch.fft.irfft2(spectrum.unsqueeze(2) * spectra, s=(SIZE, SIZE)))
    maps = torch.stack(saving, dim=3)  # [B, F, shape, colour, y, x]
    # Best position of each frame, summed over frames: [B, shapes * colours].
    total = maps.flatten(4).amax(-1).sum(1).flatten(1)
    best = total.argmax(1)
    shape, colour_index = best // len(COLOURS), best % len(COLOURS)
    # [B, F, SIZE, SIZE] of the shape and colour that were read; its peaks are the track [B, F, 2].
    winner = maps[torch.arange(batch), :, shape, colour_index]
    peak = winner.flatten(2).argmax(-1)
    track = torch.stack((peak // SIZE, peak % SIZE), dim=-1)
    wanted = velocity(conditions)
    # Differences on the torus; [B], the share of frame steps that are the asked velocity to the pixel.
    exact = ((track[:, 1:] - track[:, :-1] - wanted[:, None]) % SIZE == 0).all(-1).float().mean(1)

    time = torch.arange(frames)
    candidates = torch.cat([_STEP * 2, _STEP * 4])
    support = []
    # Each velocity: undo its motion, add the frames up; a video that moves so has one high peak, at its start.
    for candidate in candidates:
        shift = (candidate[None] * time[:, None]) % SIZE
        rows = (torch.arange(SIZE)[None] + shift[:, :1]) % SIZE
        columns = (torch.arange(SIZE)[None] + shift[:, 1:]) % SIZE
        aligned = winner[:, time[:, None, None], rows[:, :, None], columns[:, None, :]].sum(1)
        support.append(aligned.flatten(1).max(-1))
    value, origin = (torch.stack(z, dim=1) for z in zip(*support, strict=True))
    fitted = value.argmax(1)
    start = origin[torch.arange(batch), fitted]
    straight = torch.stack((start // SIZE, start % SIZE), -1)[:, None] + candidates[fitted][:, None] * time[:, None]
    # Signed distance from the straight track, the short way round the torus.
    off = (track - straight + SIZE // 2) % SIZE - SIZE // 2
    near = (off.abs().amax(-1) <= 1).float().mean(1) >= 0.8
    motion = (candidates[fitted] == wanted).all(-1) & near
    return Scores(shape == conditions[:, 0], colour_index == conditions[:, 1], motion, exact)
