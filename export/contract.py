"""The bundle as a contract: does a folder hold what it says, really quantized, and does it still run?"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor, fx

from fxq import kernels
from fxq.core.facts import Facts
from fxq.core.ir import LAYER_TENSORS, planned
from fxq.core.layer import LayerError, LayerTensors, Operators, QuantizedLayer
from fxq.export.bundle import TENSORS, Manifest, is_sealed, load, read_manifest, stated_seal
from fxq.export.files import BundleError
from fxq.export.fingerprint import compare_fingerprint
from fxq.export.graph.rehearsal import RehearsalError
from fxq.export.receipt import read_receipt
from fxq.kernels.gemm import fp8
from fxq.kernels.gemm import op as gemm
from fxq.kernels.native.build import SETS
from fxq.runtime.messages import first_line
from fxq.runtime.streams import as_text
from fxq.runtime.tables import Sheet

FALLBACK = "reference"
"""The implementation that runs where nothing faster is bound."""
SOUND = frozenset({*(found.kernel for found in SETS), "triton", "int_mm", gemm.IN_FLOAT, fp8.ON_CPU, "eager"})
"""Implementations that are written for their device; any other, :data:`FALLBACK` among them, is a failure."""

Status = Literal["passed", "failed", "skipped"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One question about a bundle and its answer."""

    name: str
    status: Status
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """One planned layer: bits, the kernels that quantize its input and multiply, and what is wrong with it."""

    layer: str
    bits: str
    quantize_kernel: str
    linear_kernel: str
    problems: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What :func:`verify_bundle` found; prints as tables, :meth:`to_json` for programs."""

    folder: str
    device: str
    checks: tuple[Check, ...]
    layers: tuple[LayerCheck, ...] = ()

    @property
    def ok(self) -> bool:
        """No check failed and no layer has a problem."""
        return all(c.status != "failed" for c in self.checks) and not any(item.problems for item in self.layers)

    def to_json(self) -> dict[str, object]:
        """JSON form, with ``ok``."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = f"{self.folder} on {self.device}: {'passed' if self.ok else 'FAILED'}"
        table = Sheet(title, {"check": "left", "result": "left"}, "detail")
        for check in self.checks:
            style = "red" if check.status == "failed" else None
            table.add(check.name, check.status, note=check.detail, style=style)
        yield table
        if not self.layers:
            return
        rows = Sheet("", dict.fromkeys(("layer", "bits", "quantize", "linear"), "left"), "problems")
        for item in self.layers:
            style = "red" if item.problems else None
            cells = (item.layer, item.bits, item.quantize_kernel, item.linear_kernel)
            rows.add(*cells, note="; ".join(item.problems), style=style)
        yield rows

    def __str__(self) -> str:
        return as_text(self)


def verify_bundle(path: str | os.PathLike[str], device: str = "cpu") -> Verdict:
    """Check a bundle: files and schema, every planned layer, the receipt, and one call against the fingerprint.

    Args:
        path: folder written by :func:`fxq.save`.
        device: where it is to run; the kernels reported are those of this device.

    Returns:
        The verdict. A missing receipt or fingerprint (older bundles, huge models) is skipped, not failed; a layer that
        would run on the reference implementation is a failure. Products of integers in float32, on a CPU without VNNI,
        are none: they are exact; the verdict says that they are slow, and so it does of float8 on a CPU, which has no
        other arithmetic for it.
    """
    folder = pathlib.Path(path)
    if device.startswith("cuda") and not torch.cuda.is_available():
        reason = "this process has no CUDA device; verify where the bundle is to run"
        return Verdict(str(folder), device, (Check("device", "failed", reason),))
    try:
        manifest, module = read_manifest(folder), load(folder, device)
    except BundleError as error:
        return Verdict(str(folder), device, (Check("files, hashes, schema and rules", "failed", str(error)),))
    layers = tuple(_layers(module, device))
    broken = [item.layer for item in layers if item.problems]
    kept = len(planned(module)) - len(layers)
    in_float = sum(item.linear_kernel == gemm.IN_FLOAT for item in layers)
    numbers = f"{len(layers)} quantized, {kept} kept" + (f"; {gemm.in_float_note()}" if in_float else "")
    numbers += f"; {fp8.NOTE}" if any(item.linear_kernel == fp8.ON_CPU for item in layers) else ""
    checks = (
        Check(
            "files, hashes, schema and rules", "passed", f"fxq {manifest.fxq_version}, {len(manifest.tensors)} tensors"
        ),
        Check(
            "planned layers are quantized",
            "failed" if broken or not layers else "passed",
            f"{len(broken)} of {len(layers)} have problems" if broken else numbers,
        ),
        _seal(folder, manifest),
        _receipt(folder, manifest),
        _fingerprint(module, manifest),
    )
    return Verdict(str(folder), device, checks, layers)


def _layers(module: fx.GraphModule, device: str) -> Iterator[LayerCheck]:
    floats = {n: t for n, t in module.named_buffers(remove_duplicate=False) if t.is_floating_point()}
    for layer, (plan, nodes) in planned(module).items():
        if plan.scheme is None:
            continue
        tensors, operators = LayerTensors.of(module, plan), Operators.of(plan.scheme)
        quantize = kernels.used(operators.quantize.name, device)
        linear = kernels.used(str(nodes[0].target).removeprefix("fxq."), device, tensors.weight)
        problems = [*_widths(map(QuantizedLayer.of, nodes)), *_twins(tensors, floats)]
        if plan.scheme.is_float8 and (reason := fp8.unusable(device)):
            problems.append(f"{reason}; quantize to int8 instead")
        elif not {quantize, linear} <= SOUND:
            problems.append(f"no kernel is bound on {device}; it would run on the {FALLBACK} implementation")
        yield LayerCheck(layer, plan.scheme.detail, quantize, linear, tuple(problems))


def _widths(layers: Iterable[QuantizedLayer]) -> Iterator[str]:
    """Integers of another width than planned."""
    for layer in layers:
        scheme = layer.scheme
        if layer.bits != scheme.code_bits:
            yield f"{layer.bits}-bit weights, planned {scheme.code_bits}"
        try:
            bits = layer.input_bits
        except LayerError:
            yield f"its input is not quantized by fxq::{Operators.of(scheme).quantize.name}"
            continue
        if bits != scheme.input_bits:
            yield f"{bits}-bit inputs, planned {scheme.input_bits}"


def _twins(tensors: LayerTensors, floats: dict[str, Tensor]) -> Iterator[str]:
    """Float tensors that hold a quantized weight a second time, under any name."""
    plan = tensors.plan
    same = {name: t for name, t in floats.items() if t.shape == (plan.out_features, plan.in_features)}
    if not same:
        return
    weight = tensors.float_weight()
    for name, tensor in same.items():
        if name in {f"{plan.layer}.{own}" for own in LAYER_TENSORS}:
            continue
        if float(torch.nn.functional.cosine_similarity(weight.flatten(), tensor.float().flatten(), dim=0)) > 0.9:
            yield f"its weight is stored in float as well, as {name}"


def _seal(folder: pathlib.Path, manifest: Manifest) -> Check:
    """What ``fxq.save`` wrote last: it finds an edited manifest, and files exchanged together with their hashes."""
    name = "the manifest is the one that was saved"
    if not manifest.seal:
        if not is_sealed(folder):
            return Check(name, "skipped", "no seal: written by a version before seals")
        return Check(name, "failed", "its seal is missing; it was taken away")
    fits = manifest.seal == stated_seal(folder)
    return Check(name, "passed" if fits else "failed", "" if fits else "its seal is another's; it was altered")


def _receipt(folder: pathlib.Path, manifest: Manifest) -> Check:
    try:
        receipt = read_receipt(folder / TENSORS)
    except BundleError as error:
        return Check("receipt", "skipped" if "carries no receipt" in str(error) else "failed", str(error))
    facts = Facts.from_json(manifest.facts)
    for name in ("recipe", "calibration_hash", "environment"):
        if getattr(receipt, name) != getattr(facts, name):
            return Check("receipt", "failed", f"its {name} is not the manifest's; one of the two was altered")
    data = f"calibration {receipt.calibration_hash[:16]}" if receipt.calibration_hash else "no calibration data"
    detail = f"{receipt.recipe.get('name')}, {data}"
    return Check("receipt", "passed", f"{detail}, torch {receipt.environment.get('torch')}")


def _fingerprint(module: fx.GraphModule, manifest: Manifest) -> Check:
    recorded = manifest.fingerprint
    if recorded is None or manifest.inputs is None or not recorded.outputs:
        reason = recorded.reason if recorded is not None and recorded.reason else "none was taken when it was saved"
        return Check("one call against the fingerprint", "skipped", f"no fingerprint recorded: {reason}")
    try:
        differences = compare_fingerprint(module, manifest.inputs, recorded)
    except RehearsalError as error:
        status: Status = "failed" if manifest.seal else "skipped"
        return Check("one call against the fingerprint", status, f"one call is too large: {error}")
    except (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return Check("one call against the fingerprint", "failed", f"the call failed: {first_line(error)}")
    within = f"{len(recorded.outputs)} outputs within {recorded.tolerance:g}"
    return Check(
        "one call against the fingerprint", "failed" if differences else "passed", "; ".join(differences) or within
    )
