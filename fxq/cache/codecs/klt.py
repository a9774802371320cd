"""A transform codec: the eigenbasis of a head's tokens, and as many bits for each coefficient as it deserves."""

from __future__ import annotations

import dataclasses
import heapq
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory, Noise, of_video, per_video, shape_of
from fxq.cache.codecs.packing import pack, packed_size, unpack
from fxq.cache.codecs.record import Field, Record, Shape
from fxq.kernels import native
from fxq.kernels.attention.codecs import Coefficients
from fxq.kernels.attention.forms import Planes
from fxq.kernels.native.unpack import pack_planes

GAUSSIAN_STEPS = (0.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
"""Best step of a uniform quantizer of 2**w levels for a Gaussian of deviation 1 (Max 1960); index w."""

MOST_BITS = len(GAUSSIAN_STEPS) - 1
"""Widest coefficient."""

FIT_TOKENS = 4096
"""A fit looks at most at so many tokens."""

_FITTED = ("mean", "basis", "step", "width")


@dataclasses.dataclass(frozen=True)
class Klt(Codec):
    """Karhunen-Loeve transform with ``bits`` per number on average.

    Coefficient i of a head gets an integer width w_i: bits go where they lower the squared error most (reverse
    water-filling), over all heads of the layer, and to the first ``rank`` coefficients only (0: to any). A coefficient
    is ``(code + 1/2 - 2**(w-1)) * step``; one of width 0 is 0. Codes are stored as bit planes over the tokens, so any
    width fits bytes.

    The basis is fitted once a video, on its first span (``fit="video"``), or lies with the model (``"model"``, from
    :meth:`fitted` on calibration data). ``joint`` takes all heads of a layer as one vector. Related: KVTC (arXiv
    2511.01815).
    """

    bits: float = 1.0
    joint: bool = False
    rank: int = 0
    fit: Literal["video", "model"] = "video"

    name: ClassVar[str] = "klt"

    def __post_init__(self) -> None:
        if not 0 < self.bits <= 8:
            raise ValueError(f"bits = {self.bits}: expected more than 0 and at most 8 per number")
        if self.rank < 0:
            raise ValueError(f"rank = {self.rank}: expected a number of coefficients, or 0 for all")
        if self.fit not in ("video", "model"):
            raise ValueError(f"fit = {self.fit!r}: expected 'video' or 'model'")

    def _groups(self, shape: Shape) -> tuple[int, int]:
        return (1, shape.heads * shape.head_dim) if self.joint else (shape.heads, shape.head_dim)

    def _rank(self, width: int) -> int:
        return min(self.rank or width, width)

    def planes(self, shape: Shape) -> int:
        """Bit planes of a layer."""
        return max(1, round(self.bits * shape.heads * shape.head_dim))

    def fields(self, shape: Shape, kind: Kind) -> tuple[Field, ...]:
        """Bit planes, and what the fit found."""
        groups, width = self._groups(shape)
        rank = self._rank(width)
        if self.planes(shape) > groups * rank * MOST_BITS:
            raise ValueError(f"{self.bits} bits do not fit {rank} coefficients of {MOST_BITS} bits; raise rank")
        return (
            Field("planes", torch.uint8, "span", (self.planes(shape), packed_size(shape.span, 1))),
            Field("mean", torch.bfloat16, self.fit, (groups, width)),
            Field("basis", torch.bfloat16, self.fit, (groups, width, rank)),
            Field("step", torch.bfloat16, self.fit, (groups, rank)),
            Field("width", torch.uint8, self.fit, (groups, rank)),
        )

    @property
    def needs_tables(self) -> bool:
        """Whether its basis comes from calibration."""
        return self.fit == "model"

    def learned(self, x: Tensor) -> Memory:
        """Mean, basis, steps and widths with ``fit="model"``, else nothing."""
        return self.fitted(x) if self.fit == "model" else {}

    def table_problem(self, tables: Memory, shape: Shape, kind: Kind) -> str:
        """As of every codec; widths must make as many planes as are stored, and steps be above 0."""
        if self.fit == "video" or (problem := super().table_problem(tables, shape, kind)):
            return "" if self.fit == "video" else problem
        planes, most, total = self.planes(shape), int(tables["width"].max()), int(tables["width"].long().sum())
        if most > MOST_BITS or total != planes:
            return f"width sums to {total} with {most} at most: expected {planes} of {MOST_BITS} at most"
        return "" if bool((tables["step"] > 0).all()) else "step holds numbers that are not above 0"

    def fitted(self, x: Tensor) -> dict[str, Tensor]:
        """Mean, basis, steps and widths as stored, for tokens [T, heads, head_dim]: the memory of ``fit="model"``.

        Raises:
            ValueError: when there are more bits than ``rank`` coefficients hold.
        """
        shape = Shape(x.shape[1], x.shape[2], x.shape[0])
        self.fields(shape, "values")
        tokens = x[:: -(-len(x) // FIT_TOKENS)].float()
        rows = tokens.reshape(len(tokens), *self._groups(shape)).transpose(0, 1)  # [groups, T, width]
        mean = rows.mean(dim=1).to(torch.bfloat16)
        centred = rows - mean.float().unsqueeze(1)
        basis = eigenbasis(centred)[..., : self._rank(centred.shape[2])].to(torch.bfloat16)
        coefficients = (centred @ basis.float()).transpose(1, 2).flatten(0, 1)  # [groups * rank, T]
        step, width = allocate(coefficients, self.planes(shape))
        return {
            "mean": mean,
            "basis": basis,
            "step": step.view(len(mean), -1).to(torch.bfloat16),
            "width": width.view(len(mean), -1).to(torch.uint8),
        }

    def encode(self, x: Tensor, kind: Kind, memory: Memory, seed: int = 0) -> tuple[Record, Memory]:
        """Transform and round; the first span of a video fits the basis."""
        shape = shape_of(x)
        fields = self.fields(shape, kind)
        if self.fit == "model":
            if not memory:
                raise ValueError("klt with fit='model' has no basis: calibrate the cache, or take fit='video'")
            planes = [self._planes(video.float(), dict(memory)) for video in x]
            return Record(fields, {"planes": torch.stack(planes).unsqueeze(1), **memory}, shape), memory
        found = memory or per_video([self.fitted(video) for video in x])
        planes = [self._planes(video.float(), of_video(found, i)) for i, video in enumerate(x)]
        return Record(fields, {"planes": torch.stack(planes).unsqueeze(1), **found}, shape), found

    def _planes(self, x: Tensor, found: dict[str, Tensor]) -> Tensor:
        rows = x.reshape(len(x), *found["mean"].shape).transpose(0, 1)
        centred = rows - found["mean"].float().unsqueeze(1)
        used = _used(found["width"])
        basis = found["basis"][..., :used].float()
        values = (basis.transpose(1, 2) @ centred.transpose(1, 2)).flatten(0, 1)  # [coefficients, T]
        width, step = found["width"][:, :used].flatten().long(), found["step"][:, :used].float().flatten()
        if values.device.type == "cpu" and native.ready():
            plane = (width.cumsum(0) - width).int()
            return pack_planes(values, step, width.to(torch.uint8), plane, int(width.sum()))
        half = torch.where(width > 0, 2.0 ** (width - 1), 0.0).unsqueeze(1)
        codes = (values / step.unsqueeze(1)).floor() + half
        codes = codes.clamp_min(0).minimum((2 * half - 1).clamp_min(0)).to(torch.int16)
        owner, shift = plane_table(width)
        return pack((codes[owner] >> shift.unsqueeze(1)) & 1, 1)

    def seeded(self, shape: Shape, kind: Kind, batch: int, spans: int, noise: Noise) -> dict[str, Tensor]:
        """As of every codec, with widths that make the planes there are, and steps that suit them."""
        found = super().seeded(shape, kind, batch, spans, noise)
        groups, rank = found["width"].shape[-2:]
        chance, planes = noise("widths", (groups * rank,)), self.planes(shape)
        width = (chance * 2 * planes / len(chance)).floor().clamp(0, MOST_BITS).long()
        while left := planes - int(width.sum()):
            free = (width < MOST_BITS if left > 0 else width > 0).nonzero().flatten()[: abs(left)]
            width[free] += 1 if left > 0 else -1
        active = max(1, int((width > 0).sum()) // groups)
        width = width.view(groups, rank).expand_as(found["width"])
        step = (0.5 + noise("steps", tuple(width.shape))) * 12**0.5 / 2.0**width / active**0.5
        return found | {"width": width.to(torch.uint8).contiguous(), "step": step.to(torch.bfloat16)}

    def decode(self, record: Record, kind: Kind) -> Tensor:
        """Planes to codes, codes to coefficients, coefficients to channels."""
        heads, videos = (record.shape.heads, record.shape.head_dim), []
        for i in range(record.batch):
            found = self._found(record, i)
            rows = self._values(record, i).transpose(1, 2) @ found["basis"].float().transpose(1, 2)
            rows = rows + found["mean"].float().unsqueeze(1)
            videos.append(rows.transpose(0, 1).reshape(rows.shape[1], *heads))
        return torch.stack(videos)

    def coefficients(self, record: Record, kind: Kind) -> Coefficients | None:
        """Those up to the last one that has bits in any head; None where a head has fewer channels than these."""
        heads, size = record.shape.heads, record.shape.head_dim
        width, shared = record.tensors["width"], self.fit == "model"
        used = _used(width)
        if used > size:
            return None
        x = torch.stack([self._values(record, i)[:, :used].permute(2, 0, 1) for i in range(record.batch)])
        basis, mean = (record.tensors[name].float() for name in ("basis", "mean"))
        basis, mean = (basis[None], mean[None]) if shared else (basis, mean)
        basis = basis[..., :used].reshape(len(basis), heads, size, used)
        return Coefficients(x.expand(-1, -1, heads, -1), basis, mean.reshape(len(mean), heads, size))

    def _found(self, record: Record, video: int) -> dict[str, Tensor]:
        shared = self.fit == "model"
        return {name: record.tensors[name] if shared else record.tensors[name][video] for name in _FITTED}

    def _values(self, record: Record, video: int) -> Tensor:
        """Coefficients of a video, float32 [groups, rank, T]."""
        found = self._found(record, video)
        width = found["width"].flatten().long()
        owner, shift = plane_table(width)
        bits = unpack(record.tensors["planes"][video], 1, record.shape.span).transpose(0, 1).flatten(1).float()
        codes = bits.new_zeros(len(width), bits.shape[1])
        codes.index_add_(0, owner, bits * (2.0**shift).unsqueeze(1))
        half = torch.where(width > 0, 2.0 ** (width - 1), 0.5).unsqueeze(1)
        values = (codes + 0.5 - half) * found["step"].float().view(-1, 1)
        return values.view(*found["step"].shape, -1)

    def form(self, shape: Shape, kind: Kind) -> Planes:
        """Bit planes and the basis."""
        return Planes(self._groups(shape)[0], self.fit == "model")


def _used(width: Tensor) -> int:
    """Coefficients up to the last one that has bits in any group [..., rank]."""
    return int((width.flatten(0, -2) > 0).any(0).nonzero().max()) + 1


def eigenbasis(x: Tensor) -> Tensor:
    """Eigenvectors of the second moments of rows [..., T, n], columns of falling eigenvalue, float32 [..., n, n].

    The largest number of each vector is positive, so that the sign is the data's and not the solver's.
    """
    moments = x.double().transpose(-1, -2) @ x.double()
    vectors = torch.linalg.eigh(moments).eigenvectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return (vectors * torch.where(largest < 0, -1.0, 1.0)).float()


def allocate(coefficients: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Steps and widths that spend ``planes`` bits a token where they lower the squared error most.

    Args:
        coefficients: float32 [n, T].
        planes: sum of all widths.

    Returns:
        Steps float32 [n] and widths int64 [n] of 0 to :data:`MOST_BITS`.
    """
    deviation = coefficients.square().mean(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    errors, steps = [coefficients.square().mean(dim=1)], [torch.ones_like(deviation)]
    for width in range(1, MOST_BITS + 1):
        error, step = _best_step(coefficients, deviation * GAUSSIAN_STEPS[width], width)
        errors.append(error)
        steps.append(step)
    error_of, step_of = torch.stack(errors), torch.stack(steps)  # [9, n]
    widths = _hull_widths(error_of.T.tolist(), planes)
    chosen = torch.tensor(widths, device=coefficients.device)
    return step_of.gather(0, chosen.unsqueeze(0))[0], chosen


def _hull_widths(errors: list[list[float]], planes: int) -> list[int]:
    """Widths of sum ``planes``: always the step, of one bit or several, that gains most per bit.

    A first bit may gain little where two gain much (a coefficient of few values), so single bits are not enough.
    """

    def best(i: int, left: int) -> tuple[float, int, int]:
        now = widths[i]
        steps = range(1, min(left, MOST_BITS - now) + 1)
        gain, bits = max(((errors[i][now] - errors[i][now + b]) / b, b) for b in steps) if steps else (-math.inf, 0)
        return -gain, i, bits

    widths, left = [0] * len(errors), planes
    queue = [best(i, left) for i in range(len(errors))]
    heapq.heapify(queue)
    while left:
        _, i, bits = heapq.heappop(queue)
        if bits <= left:
            widths[i], left = widths[i] + bits, left - bits
        heapq.heappush(queue, best(i, left))
    return widths


def _best_step(x: Tensor, around: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Least mean squared error [n] and its step [n], of steps around those given."""
    half = 2.0 ** (width - 1)
    best, chosen = torch.full_like(around, torch.inf), around
    for factor in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0):
        step = (around * factor).to(torch.bfloat16).float()
        codes = (x / step.unsqueeze(1)).floor().clamp(-half, half - 1)
        error = (x - (codes + 0.5) * step.unsqueeze(1)).square().mean(dim=1)
        chosen, best = torch.where(error < best, step, chosen), torch.minimum(error, best)
    return best, chosen


def plane_table(width: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficient and bit of every plane, int64 [planes] each, of widths int64 [n]."""
    owner = torch.arange(len(width), device=width.device).repeat_interleave(width)
    first = (width.cumsum(0) - width).repeat_interleave(width)
    return owner, torch.arange(len(owner), device=width.device) - first
