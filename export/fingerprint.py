"""A few numbers of one call of a captured graph on seeded inputs: does it still compute what it computed when saved?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, fx

from fxq.export.inputs import InputEntry, call_flat, hint_of, noise, seeded_inputs
from fxq.export.strict import DtypeName, Finite, Shape, Text
from fxq.ir import example_value, planned
from fxq.reading import MAX_TENSORS

SEED = 2605
PROJECTIONS = 4
MAX_PRODUCTS = 5_000_000_000
MAX_INPUT_VALUES = 2**24
MAX_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputMark:
    """One output: shape, dtype, Euclidean norm, and its products with fixed rows of signs."""

    dtype: DtypeName
    shape: Shape
    norm: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    projections: Annotated[tuple[Finite, ...], Field(min_length=PROJECTIONS, max_length=PROJECTIONS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The outputs of one seeded call, or the ``reason`` why none was made.

    ``tolerance`` is relative to each output's norm: kernels agree on the integers, not on the last bits of floats,
    and where a float lies on the border of two integers the next layer sees the difference.
    """

    seed: Annotated[int, Field(ge=0, lt=2**31)] = SEED
    tolerance: Annotated[float, Field(ge=0, le=MAX_TOLERANCE)] = 0.0
    outputs: Annotated[tuple[OutputMark, ...], Field(max_length=MAX_TENSORS)] = ()
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
    try:
        outputs = call_flat(module, seeded_inputs(entries, SEED, device_of(module)))
    except (ArithmeticError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return Fingerprint(reason=f"the graph refuses seeded inputs: {str(error).splitlines()[0][:200]}")
    floats = [output for output in outputs if output.is_floating_point()]
    if not floats or not all(bool(output.isfinite().all()) for output in floats):
        return Fingerprint(reason="the graph gives no finite floating point output on seeded inputs")
    half = any(output.element_size() < 4 for output in floats)
    return Fingerprint(tolerance=0.05 if half else 0.01, outputs=tuple(_mark(output) for output in outputs))


def compare_fingerprint(module: fx.GraphModule, entries: Sequence[InputEntry], recorded: Fingerprint) -> list[str]:
    """Differences between the module's outputs and a recorded fingerprint, as sentences; empty when it still holds.

    Raises:
        ValueError, RuntimeError: as the graph does when it cannot be called.
    """
    outputs = call_flat(module, seeded_inputs(entries, recorded.seed, device_of(module)))
    if len(outputs) != len(recorded.outputs):
        return [f"{len(outputs)} outputs, recorded {len(recorded.outputs)}"]
    found = []
    for number, (output, want) in enumerate(zip(outputs, recorded.outputs, strict=True)):
        got = _mark(output)
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            found.append(f"output {number} is {got.dtype} {got.shape}, recorded {want.dtype} {want.shape}")
            continue
        distance = max(
            abs(a - b) for a, b in zip((got.norm, *got.projections), (want.norm, *want.projections), strict=True)
        )
        if not distance <= recorded.tolerance * want.norm:
            found.append(
                f"output {number} differs by {distance / max(want.norm, 1e-30):.2g} of its norm, "
                f"tolerance {recorded.tolerance:g}"
            )
    return found


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


def _mark(output: Tensor) -> OutputMark:
    flat = output.detach().double().flatten().cpu()
    signs = [(noise(flat.numel(), SEED + 101 * (i + 1)) < 0.5).double() * 2 - 1 for i in range(PROJECTIONS)]
    return OutputMark(
        dtype=str(output.dtype).removeprefix("torch."),
        shape=tuple(output.shape),
        norm=_rounded(float(flat.norm())),
        projections=tuple(_rounded(float(flat @ sign)) for sign in signs),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
