"""Estimate what a quantization will need before it starts, from shapes and a short measurement."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fxq.calibration.row_sample import row_limit
from fxq.core.config import Recipe, Scheme
from fxq.core.method import LearningMethod, SolvingMethod
from fxq.core.rows import WIDE, Weighting
from fxq.numerics import PACK_BLOCK
from fxq.passes.methods.quadratic import DOUBLE, ROWS
from fxq.passes.transforms.low_rank import LowRank
from fxq.passes.transforms.smooth import Smooth
from fxq.planning.drive import Drive
from fxq.planning.estimate import JobEstimate
from fxq.planning.memory import quantized_bytes
from fxq.planning.speed import Speed, measure_speed
from fxq.runtime.memory.residency import Residency

_PROCESS = int(0.6e9)  # Python, torch, the graph; measured on 300 linears
_REMNANTS = 6  # times the largest weight: what the allocator keeps of earlier matrix products; measured at 1.3B and 14B
_SEARCH, _LEARN = 11, 100  # bytes per weight of a layer: float32 copies and integers; gradients and moments beside them
_SOLVE = 34  # bytes per weight of methods that solve: the form, integers and slopes, and float64 sums
_FORM = 20  # the same while the form is made
_FILES = int(0.2e9)  # of calibration rows, and of what a backward pass needs, that lie in files
_SCRATCH = int(0.1e9)  # of a search, which works on a part of the weights at a time
_TOGETHER = 3  # layers of one module that read the same input and are solved together: queries, keys and values
_SAMPLED = 1 << 20  # calibration values of a layer that are searched for its range
_BACKWARD = 2  # times the calls: a backward pass without gradients of weights costs as much as they do
_CAPTURE = 0.05  # seconds per linear that torch.export takes


@dataclass(frozen=True)
class _Layer:
    """A linear that is to be quantized; ``group`` layers like it share its input and its problem."""

    outputs: int
    width: int
    scheme: Scheme
    group: int
    leads: bool

    @property
    def weights(self) -> int:
        return self.outputs * self.width

    @property
    def stored(self) -> int:
        """Bytes of the weight in a file."""
        return self.scheme.weight_bytes(self.outputs, self.width)


def estimate_job(
    model: nn.Module,
    recipe: Recipe,
    drive: Drive | None = None,
    *,
    example: Drive | None = None,
    measures_sensitivity: bool = False,
    folder: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    speed: Speed | None = None,
) -> JobEstimate:
    """Estimate a quantization; takes about a second, of which the measurement of this machine is the most.

    Args:
        model: any module with :class:`torch.nn.Linear`, mapped from a file, in memory or on the meta device.
        recipe: what is to be done with it.
        drive: the calibration calls, see :func:`~fxq.planning.drive.drive_rollout`; None: there are none.
        example: the call to trace with, see :func:`~fxq.planning.drive.drive_batches`; like one of ``drive`` if None.
        measures_sensitivity: the loader is a rollout, so weightings that need sensitivities measure them.
        folder: checkpoint directory.
        out: where the bundle goes; None: it is not saved.
        speed: of this machine; measured if None.
    """
    drive, layers, dtype = drive or Drive(), list(_layers(model, recipe)), next(model.parameters()).dtype
    example = example or drive
    speed = speed or measure_speed(recipe, dtype)
    twice = measures_sensitivity and bool(drive.calls) and recipe.chunk_weighting.needs_sensitivity
    disk = _disk(model, recipe, layers, drive, twice, folder is not None, out is not None)
    places = {"checkpoint files": folder, "bundle": out}
    return JobEstimate(
        ram=_ram(model, recipe, layers, drive, example, twice, folder is not None),
        ram_with_folder=max(_ram(model, recipe, layers, drive, example, twice, True).values()),
        disk=disk,
        time=_time(recipe, layers, drive, example, twice, speed),
        ram_total=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_free=_room({pathlib.Path(path): disk[name] for name, path in places.items() if path is not None}),
        assumptions=(
            "every quantized layer has two scales, and every method takes its full number of steps",
            f"slices ran at {speed.flops / 1e9:.0f} GFLOP/s, {speed.search * 1e9:.0f} ns per weight searched and "
            f"{speed.learn * 1e9:.0f} ns per weight and iteration learned; other work on the machine shows in it",
            "reading the weights is not counted; it takes long when they are larger than the free memory",
            *drive.assumptions,
        ),
    )


def _layers(model: nn.Module, recipe: Recipe) -> Iterator[_Layer]:
    found = []
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    rules = replace(recipe, rules=recipe.planned_rules).decide(linears)
    for name, module in linears.items():
        rule = rules[name]
        if rule is None or rule.scheme is None:
            continue
        if rule.scheme.weight_bits > 4 or module.in_features % PACK_BLOCK == 0:
            kind = (name.rpartition(".")[0], module.out_features, module.in_features, rule.scheme)
            found.append(kind)
    counts: Counter[Any] = Counter()
    totals = Counter(found)
    for kind in found:
        counts[kind] += 1
        group = min(_TOGETHER, totals[kind]) if recipe.share_inputs else 1
        yield _Layer(*kind[1:], group=group, leads=counts[kind] == 1 or counts[kind] > group)


def _candidates(recipe: Recipe) -> int:
    """How often a layer is solved: at each width of a budget that is one of integers."""
    return 1 if recipe.budget is None else sum(width < 16 for width in recipe.budget.widths)


def _kept_rows(recipe: Recipe, drive: Drive, width: int) -> int:
    """Calibration rows of a layer with inputs of that many channels."""
    limit = row_limit(width) if recipe.max_rows is None else recipe.max_rows
    return min(limit, drive.calls * min(recipe.rows_per_call, drive.tokens))


def _sums_bytes(recipe: Recipe, layer: _Layer) -> int:
    """Bytes of the sums over all rows of a layer's inputs, where the recipe asks for them."""
    if not recipe.all_rows or not any(isinstance(method, SolvingMethod) for method in recipe.methods):
        return 0
    kinds = 2 if recipe.chunk_weighting is Weighting.GRADIENT else 1
    return kinds * layer.width**2 * (8 if layer.width <= WIDE else 4)


def _ram(
    model: nn.Module, recipe: Recipe, layers: list[_Layer], drive: Drive, example: Drive, twice: bool, folder: bool
) -> dict[str, int]:
    """Bytes at the worst moment of each phase."""
    size = next(model.parameters()).dtype.itemsize
    rows = {layer.width: _kept_rows(recipe, drive, layer.width) for layer in layers}
    held = [] if folder else [rows[layer.width] * layer.width * size for layer in layers if layer.leads]
    held += [] if folder else [_sums_bytes(recipe, layer) for layer in layers if layer.leads]
    integers = 0 if folder else sum(layer.weights for layer in layers)
    packed = sum(layer.stored for layer in layers if layer.scheme.weight_bits < 8)
    widest = max((layer.weights for layer in layers), default=0) * size
    base = _PROCESS + _unmapped_bytes(model) + _REMNANTS * widest
    phases = {"tracing": base + 2 * example.call_bytes + widest}
    changed = sum(layer.weights for layer in layers) * size if recipe.transforms else 0  # never in files
    base += changed
    if drive.calls:
        phases["calibration"] = (
            base + drive.call_bytes + widest + sum(held) + (_FILES if folder else _graph(recipe, layers, drive))
        )
    if twice:
        phases["sensitivity"] = base + changed + drive.call_bytes + drive.kept_bytes + sum(held) + integers
    work = max((_working_set(recipe, layer, rows[layer.width]) for layer in layers), default=0)
    phases["reconstruction"] = base + sum(held) + integers * _candidates(recipe) + work
    phases["writing"] = base + integers + packed + _kept_bytes(model, layers)
    return phases


def _graph(recipe: Recipe, layers: list[_Layer], drive: Drive) -> int:
    """Bytes that a call keeps for its backward pass: in float32, of each layer its output and what was made of it."""
    if recipe.chunk_weighting is not Weighting.GRADIENT:
        return 0
    return sum(3 * 4 * drive.tokens * layer.outputs for layer in layers)


def _working_set(recipe: Recipe, layer: _Layer, rows: int) -> int:
    """Bytes of solving a layer and those that are solved with it."""
    methods = recipe.methods if layer.scheme.reconstruct and rows else ()
    learns = any(isinstance(method, LearningMethod) for method in methods)
    weights = layer.group * layer.weights
    targets = 4 * rows * layer.group * layer.outputs if learns else 0
    work = weights * (_LEARN if learns else _SEARCH)
    if any(isinstance(method, SolvingMethod) for method in methods):
        size = 8 if layer.width <= DOUBLE else 4  # of a sum; two matrices of the inputs are there at once
        part = min(rows, ROWS) * (14 * layer.width + 12 * layer.group * layer.outputs)
        form = weights * _FORM + layer.width**2 * size + part
        form += 3 * layer.width**2 * size if _sums_bytes(recipe, layer) else 0  # moments, in order, and of the sample
        work = max(work, form, weights * _SOLVE + layer.width**2 * (2 * size + 1))
    return _SCRATCH + work + (8 if learns else 4) * rows * layer.width + targets


def _unmapped_bytes(model: nn.Module) -> int:
    """Bytes of the weights that are in memory already."""
    tensors: list[Tensor] = [t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu"]
    return max(0, sum(t.nbytes for t in tensors) - Residency().mapped_bytes(*tensors))


def _kept_bytes(model: nn.Module, layers: list[_Layer]) -> int:
    """Bytes of everything that is not quantized, in model dtype."""
    size = next(model.parameters()).dtype.itemsize
    return sum(p.nbytes for p in model.parameters()) - size * sum(layer.weights for layer in layers)


def _disk(
    model: nn.Module, recipe: Recipe, layers: list[_Layer], drive: Drive, twice: bool, folder: bool, out: bool
) -> dict[str, int]:
    sizes = {}
    if folder:
        size = next(model.parameters()).dtype.itemsize
        kept = (_kept_rows(recipe, drive, layer.width) * layer.width for layer in layers if layer.leads)
        stored = sum(layer.weights for layer in layers) * (_candidates(recipe) + twice)
        backward = _graph(recipe, layers, drive) * size // 4 if drive.calls else 0  # while a call lasts
        sums = sum(_sums_bytes(recipe, layer) for layer in layers if layer.leads) if drive.calls else 0
        sizes["checkpoint files"] = stored + size * 5 * sum(kept) // 4 + backward + sums
    if out:
        quantized = sum(quantized_bytes(layer.width, layer.outputs, 0) + layer.stored for layer in layers)
        ranks = sum(step.rank for step in recipe.transforms if isinstance(step, LowRank))
        branches = (
            ranks * sum(layer.width + layer.outputs for layer in layers) * next(model.parameters()).dtype.itemsize
        )
        sizes["bundle"] = quantized + branches + _kept_bytes(model, layers)
    return sizes


def _time(
    recipe: Recipe, layers: list[_Layer], drive: Drive, example: Drive, twice: bool, speed: Speed
) -> dict[str, float]:
    weights = sum(layer.weights for layer in layers)
    rows = {layer.width: _kept_rows(recipe, drive, layer.width) for layer in layers}
    inputs = any(rows.values())
    sampled = sum(min(_SAMPLED, rows[layer.width] * layer.width) for layer in layers if layer.leads)
    learned = sum(layer.weights for layer in layers if layer.scheme.reconstruct) if inputs else 0
    iterations = sum(method.iterations for method in recipe.methods if isinstance(method, LearningMethod))
    solved = [layer for layer in layers if layer.leads and layer.scheme.reconstruct] if inputs else []
    solvers = [method for method in recipe.methods if isinstance(method, SolvingMethod)]
    operations = sum(
        method.operations(rows[layer.width], layer.width, layer.group * layer.outputs)
        for method in solvers
        for layer in solved
    )
    squares = sum(_sums_bytes(recipe, layer) // (8 if layer.width <= WIDE else 4) for layer in layers if layer.leads)
    summed = 2.0 * drive.calls * drive.tokens * squares
    passes = _BACKWARD if recipe.chunk_weighting is Weighting.GRADIENT else 1
    search = weights * speed.search + sampled * speed.inputs
    tried = sum(1 + len(step.alphas) for step in recipe.transforms if isinstance(step, Smooth)) if inputs else 0
    seconds = {
        "tracing": _CAPTURE * len(layers) + 2 * example.flops / max(1, example.calls) / speed.flops,
        "calibration": (passes * drive.flops + summed) / speed.flops,
        "sensitivity": search + drive.sensitivity_flops / speed.flops if twice else 0.0,
        "search": search * (_candidates(recipe) + tried),
        "reconstruction": (learned * iterations * speed.learn + operations / speed.flops) * _candidates(recipe),
    }
    return {name: value for name, value in seconds.items() if value}


def _room(needed: Mapping[pathlib.Path, int]) -> int:
    """Free bytes of the disk that gets fullest, less what goes there."""
    free: dict[int, int] = {}
    for path, size in needed.items():
        there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        disk = there.stat().st_dev
        free[disk] = free.get(disk, shutil.disk_usage(there).free) - size
    return min(free.values(), default=0)
