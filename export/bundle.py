"""The bundle: a folder of ``model.safetensors``, ``graph.json`` and ``manifest.json``; see docs/bundle.md."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import fx

import fxq.kernels  # registers the operators a bundle's graph calls
from fxq.export.files import BundleError, check_place, sha256, whole_folder, write_tensors
from fxq.export.fingerprint import Fingerprint, take_fingerprint
from fxq.export.graph_json import GraphFormatError, graph_from_json, graph_to_json, tensors_of
from fxq.export.inputs import InputEntry, input_entries, record_values
from fxq.export.receipt import make_receipt
from fxq.ir import LayerPlan, QuantGraph, Stage, facts_of, planned, set_facts
from fxq.signature import guard_inputs
from fxq.verify import RuleError, check

FORMAT_VERSION = 1
MANIFEST, TENSORS, GRAPH = "manifest.json", "model.safetensors", "graph.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Dtype (torch name) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """One linear: its plan (scheme or reason) and the names of its tensors."""

    plan: dict[str, Any]
    tensors: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle holds.

    ``facts``: recipe, sensitivity, calibration hash, environment; ``files``: sha256 by name. ``inputs`` and
    ``fingerprint`` are None in bundles written before they existed.
    """

    format_version: int
    fxq_version: str
    facts: dict[str, Any]
    layers: dict[str, LayerEntry]
    tensors: dict[str, TensorEntry]
    files: dict[str, str]
    inputs: tuple[InputEntry, ...] | None = None
    fingerprint: Fingerprint | None = None


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def save(
    module: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    metrics: Mapping[str, Any] | None = None,
    fingerprint: bool = True,
) -> pathlib.Path:
    """Write a bundle. The folder appears whole or not at all; an older bundle there is replaced.

    Args:
        module: made by :func:`fxq.quantize` or :func:`fxq.load`.
        path: the folder.
        metrics: results to put into the receipt, JSON values by name.
        fingerprint: call the module once on seeded inputs, so that ``fxq verify`` can compare; left out by itself
            where that takes more than a second or so.

    Returns:
        The folder.

    Raises:
        BundleError: when the module is not a finished quantized graph or the place is taken by something else.
    """
    out = pathlib.Path(path).absolute()
    try:
        facts = facts_of(module)
        if "remarks" in facts:
            raise ValueError("it is optimized for this machine; save the module it was made from")
        check(QuantGraph(module, Stage.FROZEN), "before save")
        graph = graph_to_json(module)
    except (ValueError, RuleError) as error:
        raise BundleError(f"cannot save {out}: {error}") from None
    plans = {layer: plan for layer, (plan, _) in planned(module).items()}
    receipt = make_receipt(fxq.__version__, facts, plans.values(), metrics or {})
    with whole_folder(out, (MANIFEST, TENSORS, GRAPH), "a bundle") as folder:
        tensors = tensors_of(module)
        write_tensors(tensors, folder / TENSORS, receipt.to_header() | {"format": "pt"})
        (folder / GRAPH).write_text(json.dumps(graph, separators=(",", ":")), encoding="utf-8")
        inputs = input_entries(module)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            fxq_version=fxq.__version__,
            facts=facts,
            layers={layer: _layer_entry(plan, tensors) for layer, plan in plans.items()},
            tensors={n: TensorEntry(dtype=_dtype_name(t), shape=tuple(t.shape)) for n, t in tensors.items()},
            files={name: sha256(folder / name) for name in (TENSORS, GRAPH)},
            inputs=inputs,
            fingerprint=take_fingerprint(module, inputs) if fingerprint else None,
        )
        (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=1), encoding="utf-8")
    return out


def check_bundle_place(path: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path of a folder that :func:`save` may write, asked before the work instead of after it.

    Raises:
        BundleError: when the place is taken by something else, or nothing can be written there.
    """
    return check_place(path, (MANIFEST, TENSORS, GRAPH), "a bundle")


def _layer_entry(plan: LayerPlan, tensors: Mapping[str, torch.Tensor]) -> LayerEntry:
    names = tuple(name for name in tensors if name.rpartition(".")[0] == plan.layer)
    return LayerEntry(plan=plan.to_json(), tensors=names)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and validate a bundle's manifest without loading tensors.

    Raises:
        BundleError: missing, malformed, or of a format this version does not know.
    """
    file = pathlib.Path(path) / MANIFEST
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{file}: {error.strerror or error}; a bundle is a folder made by fxq.save") from None
    except ValueError as error:
        raise BundleError(f"{file} is not valid JSON ({error}); the bundle is damaged, save it again") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{file}: format version {version!r}, this fxq reads {FORMAT_VERSION}; "
            "load it with the fxq version that wrote it "
            f"({data.get('fxq_version', 'unknown') if isinstance(data, dict) else 'unknown'})"
        )
    try:
        return TypeAdapter(Manifest).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(
            f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}; the bundle is damaged"
        ) from None


def check_files(folder: pathlib.Path, manifest: Manifest, *, hash_tensors: bool = True) -> None:
    """Compare a bundle's files with its manifest.

    Args:
        folder: the bundle.
        manifest: its manifest.
        hash_tensors: whether to read all of the tensors for their hash.

    Raises:
        BundleError: when a file is missing, truncated or altered.
    """
    if set(manifest.files) != {TENSORS, GRAPH}:
        raise BundleError(f"{folder / MANIFEST}: lists files {sorted(manifest.files)}, expected {GRAPH} and {TENSORS}")
    for name, digest in manifest.files.items():
        if not (folder / name).is_file():
            raise BundleError(f"{folder / name} is missing; copy the whole folder")
        if (hash_tensors or name == GRAPH) and sha256(folder / name) != digest:
            raise BundleError(
                f"{folder / name} does not have the hash the manifest states: truncated or altered; copy it again"
            )


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> fx.GraphModule:
    """Load a bundle into a runnable GraphModule. Nothing is unpickled and no code from the bundle runs.

    The nodes get their example values back where the bundle states its inputs, so that :func:`fxq.optimize` can work
    on the result.

    Args:
        path: folder written by :func:`save`.
        device: where tensors go.

    Raises:
        BundleError: when a file is missing, truncated, altered, of an unknown version or inconsistent.
    """
    folder = pathlib.Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    try:
        with safe_open(folder / TENSORS, "pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BundleError(f"{folder / TENSORS} cannot be read: {error}") from None
    found = {n: TensorEntry(dtype=_dtype_name(t), shape=tuple(t.shape)) for n, t in tensors.items()}
    if found != manifest.tensors:
        wrong = [n for n in sorted({*found, *manifest.tensors}) if found.get(n) != manifest.tensors.get(n)]
        raise BundleError(f"{folder}: tensors differ from the manifest: {', '.join(wrong[:5])}")
    try:
        module = graph_from_json(json.loads((folder / GRAPH).read_text(encoding="utf-8")), tensors, device)
        set_facts(module, manifest.facts)
        guard_inputs(module, manifest.facts.get("inputs", []))
        check(QuantGraph(module, Stage.FROZEN), "after load")
        if manifest.inputs is not None:
            record_values(module, manifest.inputs, torch.device(device))
    except (GraphFormatError, RuleError, ValueError) as error:
        raise BundleError(f"{folder / GRAPH}: {error}") from None
    plans = {layer: plan.to_json() for layer, (plan, _) in planned(module).items()}
    if plans != {layer: entry.plan for layer, entry in manifest.layers.items()}:
        raise BundleError(
            f"{folder}: the plans on the graph differ from the manifest's layers; the bundle is inconsistent"
        )
    return module
