"""A few numbers of one call of a captured graph on seeded inputs: does it still compute what it computed when saved?"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, fx

from fxq.core.ir import example_value, planned
from fxq.core.signature import hint_of
from fxq.dtypes import dtype_name
from fxq.export.graph.encoded import packs, seeded_cache
from fxq.export.graph.rehearsal import Brake, RehearsalError, rehearse
from fxq.export.graph.strict import DtypeName, Finite, Shape, Text
from fxq.export.inputs import InputEntry, call_flat, noise, pieces, seeded_inputs, without_data
from fxq.runtime.messages import first_line
from fxq.runtime.reading import MAX_TENSORS

SEED = 2605
PROJECTIONS = 16
"""Of an output: an error twice the tolerance, of any shape, then passes less than once in a million times."""
OLDEST_PROJECTIONS = 4
MAX_PRODUCTS = 5_000_000_000
MAX_INPUT_VALUES = 2**24
MAX_TOLERANCE = 0.05
MAX_CALL_BYTES = 1 << 27
"""Most bytes of the inputs and values of the call; three times the stored tensors where that is more."""
MAX_CALL_WORK = 2**35


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputMark:
    """One output: shape, dtype, Euclidean norm, and its products with fixed rows of signs."""

    dtype: DtypeName
    shape: Shape
    norm: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    projections: Annotated[tuple[Finite, ...], Field(min_length=OLDEST_PROJECTIONS, max_length=PROJECTIONS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What one seeded call gives, or the ``reason`` why none was made.

    ``writes`` are the contents, after the call, of inputs and stored tensors that it wrote into; None in bundles from
    before these were recorded.
    ``tolerance`` is relative to each output's norm: kernels agree on the integers, not on the last bits of floats,
    and where a float lies on the border of two integers the next layer sees the difference. ``inputs`` says what a
    cache's codecs read: numbers as any other input, or what they could have ``stored``.
    """

    inputs: Literal["plain", "stored"] = "plain"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = SEED
    tolerance: Annotated[float, Field(ge=0, le=MAX_TOLERANCE)] = 0.0
    outputs: Annotated[tuple[OutputMark, ...], Field(max_length=MAX_TENSORS)] = ()
    writes: Annotated[tuple[OutputMark, ...], Field(max_length=MAX_TENSORS)] | None = None
    reason: Text = ""


def take_fingerprint(module: fx.GraphModule, entries: Sequence[InputEntry] | None) -> Fingerprint:
    """Run the module once on seeded inputs of the captured sizes, if that is a matter of a second.

    Args:
        module: a quantized module.
        entries: its inputs, or None when they are not known.

    Returns:
        The fingerprint; with a ``reason`` and no outputs where the call is too large, impossible or not finite.
    """
    if entries is None:
        return Fingerprint(reason="the sizes of the inputs are not known")
    if reason := _too_large(module, entries):
        return Fingerprint(reason=reason)
    inputs: Literal["plain", "stored"] = "stored" if packs(module) else "plain"
    try:
        outputs, writes = seeded_call(module, entries, SEED, inputs)
    except RehearsalError as error:
        return Fingerprint(reason=f"one call is too large: {error}")
    except (ArithmeticError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return Fingerprint(reason=f"the graph refuses seeded inputs: {first_line(error, 200)}")
    floats = [output for output in outputs if output.is_floating_point()]
    if not floats or not all(bool(output.isfinite().all()) for output in floats):
        return Fingerprint(reason="the graph gives no finite floating point output on seeded inputs")
    half = any(output.element_size() < 4 for output in floats)
    return Fingerprint(
        inputs=inputs,
        tolerance=0.05 if half else 0.01,
        outputs=tuple(_mark(output) for output in outputs),
        writes=tuple(_mark(written) for written in writes),
    )


def compare_fingerprint(module: fx.GraphModule, entries: Sequence[InputEntry], recorded: Fingerprint) -> list[str]:
    """Differences between the module's outputs and a recorded fingerprint, as sentences; empty when it still holds.

    Raises:
        RehearsalError: when the call would take more than a fingerprint's call may.
        ValueError, RuntimeError: as the graph does when it cannot be called.
    """
    outputs, writes = seeded_call(module, entries, recorded.seed, recorded.inputs)
    found = _differences("output", outputs, recorded.outputs, recorded.tolerance)
    if recorded.writes is not None:
        found += _differences("written tensor", writes, recorded.writes, recorded.tolerance)
    return found


def _differences(what: str, tensors: Sequence[Tensor], marks: Sequence[OutputMark], tolerance: float) -> list[str]:
    if len(tensors) != len(marks):
        return [f"{len(tensors)} {what}s, recorded {len(marks)}"]
    found = []
    for number, (tensor, want) in enumerate(zip(tensors, marks, strict=True)):
        got = _mark(tensor, len(want.projections))
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            found.append(f"{what} {number} is {got.dtype} {got.shape}, recorded {want.dtype} {want.shape}")
            continue
        distance = max(
            abs(a - b) for a, b in zip((got.norm, *got.projections), (want.norm, *want.projections), strict=True)
        )
        if not distance <= tolerance * want.norm:
            found.append(
                f"{what} {number} differs by {distance / max(want.norm, 1e-30):.2g} of its norm, "
                f"tolerance {tolerance:g}"
            )
    return found


class SeededCall(NamedTuple):
    """The tensors that a call returns, and those of inputs and module that it wrote into."""

    outputs: list[Tensor]
    writes: list[Tensor]


def seeded_call(
    module: fx.GraphModule, entries: Sequence[InputEntry], seed: int, inputs: Literal["plain", "stored"] = "plain"
) -> SeededCall:
    """One call on seeded inputs, of bounded size.

    Args:
        module: a quantized module.
        entries: its inputs.
        seed: of the numbers.
        inputs: as in :class:`Fingerprint`.

    Raises:
        RehearsalError: when inputs and values would take more than ``MAX_CALL_BYTES``, or the call more than
            ``MAX_CALL_WORK`` multiplications; nothing was run then.
        ValueError, RuntimeError: as the graph does when it cannot be called.
    """
    leaves = without_data(entries)
    taken = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
    stored = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    limit = max(MAX_CALL_BYTES, 3 * stored) - taken
    cost = rehearse(module, leaves)
    if cost.bytes > limit or cost.work > MAX_CALL_WORK:
        raise RehearsalError(
            f"its inputs and values take {taken + cost.bytes} bytes and {cost.work} multiplications, at most "
            f"{limit + taken} and {MAX_CALL_WORK} are spent"
        )
    device, sizes = device_of(module), [tuple(entry.example) for entry in entries]
    given = seeded_inputs(entries, seed, device)
    for at, tensor in (seeded_cache(module, sizes, seed, noise) if inputs == "stored" else {}).items():
        given[at] = tensor.to(device)
    held = [t for t in given if isinstance(t, Tensor)] + [*module.parameters(), *module.buffers()]
    versions = [tensor._version for tensor in held]
    with contextlib.nullcontext() if cost.known else Brake(limit, MAX_CALL_WORK):
        outputs = call_flat(module, given)
    return SeededCall(outputs, [t for t, before in zip(held, versions, strict=True) if t._version != before])


def device_of(module: fx.GraphModule) -> torch.device:
    """Where the module's tensors lie."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _too_large(module: fx.GraphModule, entries: Sequence[InputEntry]) -> str:
    values = sum(math.prod(entry.example) for entry in entries)
    if values > MAX_INPUT_VALUES:
        return f"the inputs have {values} values, more than {MAX_INPUT_VALUES}"
    products = 0
    for plan, nodes in planned(module).values():
        for node in nodes:
            value = example_value(node)
            if not isinstance(value, Tensor):
                return "the graph carries no recorded values"
            try:
                products += math.prod(hint_of(size) for size in value.shape) * plan.in_features
            except ValueError as error:
                return f"what a call costs is not known: {error}"
    return f"one call multiplies {products} times, more than {MAX_PRODUCTS}" if products > MAX_PRODUCTS else ""


def _mark(output: Tensor, projections: int = PROJECTIONS) -> OutputMark:
    squares, products = 0.0, [0.0] * projections
    for start, part in pieces(output.detach().cpu().contiguous()):
        flat = part.double()
        squares += float(flat.square().sum())
        for i in range(projections):
            signs = (noise(len(flat), SEED + 101 * (i + 1), start) < 0.5).double() * 2 - 1
            products[i] += float(flat @ signs)
    return OutputMark(
        dtype=dtype_name(output.dtype),
        shape=tuple(output.shape),
        norm=_rounded(squares**0.5),
        projections=tuple(_rounded(product) for product in products),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
