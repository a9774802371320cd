"""The bundle: a folder of ``model.safetensors``, ``graph.json`` and ``manifest.json``; see docs/bundle.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx

import fxq.kernels  # noqa: F401 registers the operators a bundle's graph calls
from fxq.core.facts import Facts
from fxq.core.ir import LayerPlan, QuantGraph, planned
from fxq.core.signature import guard_inputs
from fxq.core.verify import RuleError, check
from fxq.dtypes import dtype_name
from fxq.export.files import BundleError, check_header, check_place, sha256, whole_folder, write_tensors
from fxq.export.fingerprint import Fingerprint, take_fingerprint
from fxq.export.graph.encoded import check_encoded
from fxq.export.graph.foreign import allowing
from fxq.export.graph.graph_json import graph_from_json, graph_to_json, tensors_of
from fxq.export.graph.narrow import MULTIPLIER, NarrowError, packed_tensors, unpacked_tensors
from fxq.export.graph.rehearsal import rehearse
from fxq.export.graph.stored import check_stored
from fxq.export.graph.strict import DtypeName, Name, SchemaError, Shape, Text, check_facts, check_plan, validated
from fxq.export.inputs import InputEntry, check_entries, input_entries, record_values_later, stand_ins
from fxq.export.receipt import make_receipt
from fxq.runtime.ambient import own_tensors
from fxq.runtime.messages import first_line
from fxq.runtime.reading import MAX_TENSORS, ReadError, read_json, regular_file
from fxq.version import __version__

FORMAT_VERSION = 1
MANIFEST, TENSORS, GRAPH = "manifest.json", "model.safetensors", "graph.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Dtype (torch name) and shape of one stored tensor."""

    dtype: DtypeName
    shape: Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """One linear: its plan (scheme or reason) and the names of the tensors under it, the model's own ones too."""

    plan: dict[str, object]
    tensors: Annotated[tuple[Name, ...], Field(max_length=MAX_TENSORS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle holds.

    ``facts``: recipe, sensitivity, calibration hash, environment; ``files``: sha256 by name. ``inputs`` and
    ``fingerprint`` are None, and ``seal`` (see :func:`seal_of`) is empty, in bundles written before they existed.
    """

    format_version: int
    fxq_version: Text
    facts: dict[str, object]
    layers: Annotated[dict[Name, LayerEntry], Field(max_length=MAX_TENSORS)]
    tensors: Annotated[dict[Name, TensorEntry], Field(max_length=MAX_TENSORS)]
    files: dict[Name, Text]
    inputs: Annotated[tuple[InputEntry, ...], Field(max_length=MAX_TENSORS)] | None = None
    fingerprint: Fingerprint | None = None
    seal: Text = ""


def save(
    module: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    metrics: Mapping[str, object] | None = None,
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
        facts = Facts.of(module)
        if facts.optimized:
            raise ValueError("it is optimized for this machine; save the module it was made from")
        check(QuantGraph.of(module), "before save")
        graph = graph_to_json(module)
    except (ValueError, RuleError) as error:
        raise BundleError(f"cannot save {out}: {error}") from None
    plans = {layer: plan for layer, (plan, _) in planned(module).items()}
    receipt = make_receipt(__version__, facts, plans.values(), metrics or {})
    with whole_folder(out, (MANIFEST, TENSORS, GRAPH), "a bundle") as folder:
        tensors = tensors_of(module)
        packed = _packed(plans.values(), tensors)
        write_tensors(packed, folder / TENSORS, receipt.to_header() | {"format": "pt"})
        (folder / GRAPH).write_text(json.dumps(graph | {"sealed": True}, separators=(",", ":")), encoding="utf-8")
        inputs = input_entries(module)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            fxq_version=__version__,
            facts=facts.to_json(),
            layers={layer: _layer_entry(plan, tensors) for layer, plan in plans.items()},
            tensors={n: TensorEntry(dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for n, t in packed.items()},
            files={name: sha256(folder / name) for name in (TENSORS, GRAPH)},
            inputs=inputs,
            fingerprint=take_fingerprint(module, inputs) if fingerprint else None,
        )
        data = dataclasses.asdict(manifest)
        data["seal"] = seal_of(data)
        (folder / MANIFEST).write_text(json.dumps(data, indent=1), encoding="utf-8")
    return out


def check_bundle_place(path: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path of a folder that :func:`save` may write, asked before the work instead of after it.

    Raises:
        BundleError: when the place is taken by something else, or nothing can be written there.
    """
    return check_place(path, (MANIFEST, TENSORS, GRAPH), "a bundle")


def seal_of(manifest: Mapping[str, object]) -> str:
    """sha256 of a manifest's JSON without its ``seal``, with sorted keys."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def stated_seal(folder: pathlib.Path) -> str:
    """The seal that the manifest in a folder should have.

    Raises:
        OSError, ReadError: when it cannot be read.
    """
    return seal_of(read_json(folder / MANIFEST, folder))


def is_sealed(folder: pathlib.Path) -> bool:
    """Whether the graph says that the manifest beside it was written with a seal.

    Raises:
        OSError, ReadError: when it cannot be read.
    """
    return read_json(folder / GRAPH, folder).get("sealed") is True


def _packed(plans: Iterable[LayerPlan], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return packed_tensors(plans, tensors)
    except NarrowError as error:
        raise BundleError(f"cannot save: {error}") from None


def narrow_plans(manifest: Manifest) -> list[LayerPlan]:
    """Plans that a manifest states, those alone whose weights have another form in files than in memory.

    Raises:
        BundleError: when one is malformed.
    """
    plans = []
    for layer, entry in manifest.layers.items():
        scheme = entry.plan.get("scheme")
        if not isinstance(scheme, dict) or not (scheme.get("weight_group") or scheme.get("weight_bits") in (5, 6, 7)):
            continue
        try:
            plans.append(LayerPlan.from_json(entry.plan))
            check_plan(plans[-1])
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{MANIFEST}: the plan of layer {layer}: {first_line(error)}") from None
    return plans


def _layer_entry(plan: LayerPlan, tensors: Mapping[str, Tensor]) -> LayerEntry:
    return LayerEntry(plan=plan.to_json(), tensors=_own(plan, tensors))


def _own(plan: LayerPlan, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the tensors that lie directly under a layer's name."""
    return tuple(name for name in tensors if name.rpartition(".")[0] == plan.layer)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and validate a bundle's manifest without loading tensors.

    Raises:
        BundleError: missing, malformed, or of a format this version does not know.
    """
    folder = pathlib.Path(path)
    file = folder / MANIFEST
    try:
        data = read_json(file, folder)
    except OSError as error:
        raise BundleError(f"{file}: {error.strerror or error}; a bundle is a folder made by fxq.save") from error
    except ReadError as error:
        raise BundleError(f"{file}: {error}; the bundle is damaged, save it again") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise BundleError(
            f"{file}: format version {str(version)[:40] if type(version) is int else repr(version)[:40]}, "
            f"this fxq reads {FORMAT_VERSION}; load it with the fxq version that wrote it "
            f"({str(data.get('fxq_version', 'unknown'))[:40] if isinstance(data, dict) else 'unknown'})"
        )
    try:
        manifest = validated(Manifest, data)
        check_facts(manifest.facts)
        check_entries(manifest.inputs or ())
    except SchemaError as error:
        raise BundleError(f"{file}: {error}; the bundle is damaged") from error
    return manifest


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
        try:
            regular_file(folder / name, folder)
        except FileNotFoundError as error:
            raise BundleError(f"{folder / name} is missing; copy the whole folder") from error
        except (OSError, ReadError) as error:
            raise BundleError(f"{folder / name} cannot be read: {error}") from error
        if (hash_tensors or name == GRAPH) and sha256(folder / name) != digest:
            raise BundleError(
                f"{folder / name} does not have the hash the manifest states: truncated or altered; copy it again"
            )


@own_tensors()
def load(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", *, operators: Iterable[str] = ()
) -> fx.GraphModule:
    """Load a bundle into a runnable GraphModule. Nothing is unpickled and no code from the bundle runs.

    The nodes get their example values back where the bundle states its inputs, so that :func:`fxq.optimize` can work
    on the result.

    Args:
        path: folder written by :func:`save`.
        device: where tensors go.
        operators: those of other libraries that the bundle may call, ``"library.name"`` each; import the library first.

    Raises:
        BundleError: when a file is missing, truncated, altered, of an unknown version or inconsistent, or when it calls
            an operator of another library that is not among ``operators``.
    """
    folder = pathlib.Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise BundleError(f"device {device} is invalid: {first_line(error)}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BundleError(f"device {place}: torch {torch.__version__} sees no GPU here; fxq doctor says more")
    with allowing(operators):
        module = read_graph(folder, manifest, _read_tensors(folder, manifest, place), place)
    if manifest.inputs is not None:
        record_values_later(module, manifest.inputs, place)
    return module


def _read_tensors(folder: pathlib.Path, manifest: Manifest, device: torch.device) -> dict[str, Tensor]:
    check_header(folder / TENSORS, folder, {name: (e.dtype, e.shape) for name, e in manifest.tensors.items()})
    try:
        with safe_open(regular_file(folder / TENSORS, folder), "pt", device=str(device)) as file:
            narrow = {plan.layer: plan for plan in narrow_plans(manifest)}
            found, packed = dict[str, Tensor](), dict[str, list[str]]()
            for name in manifest.tensors:
                layer, _, leaf = name.rpartition(".")
                if layer in narrow and leaf in ("weight", MULTIPLIER):
                    packed.setdefault(layer, []).append(name)
                else:
                    found[name] = file.get_tensor(name)
            for layer, plan in narrow.items():  # one at a time: both forms of all would be much memory
                found |= unpacked_tensors([plan], {name: file.get_tensor(name) for name in packed.get(layer, ())})
        return found
    except NarrowError as error:
        raise BundleError(f"{folder}: {error}; the bundle is damaged") from error
    except (OSError, ReadError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"{folder / TENSORS} cannot be read: {error}") from error


def read_graph(
    folder: pathlib.Path, manifest: Manifest, tensors: dict[str, Tensor], device: torch.device, values: bool = True
) -> fx.GraphModule:
    """A bundle's graph as a module that refuses calls of other sizes; its operators were tried on tensors without data.

    Args:
        folder: the bundle.
        manifest: its manifest.
        tensors: by name, those of the manifest; stand-ins will do.
        device: takes the place of every device in the graph.
        values: whether to look at the values of scales and permutations; not of stand-ins.

    Raises:
        BundleError: when the graph is malformed, calls what it must not, breaks a rule, or does not fit its inputs, its
            tensors or the manifest.
    """
    try:
        module = graph_from_json(read_json(folder / GRAPH, folder), tensors, device)
        facts = Facts.from_json(manifest.facts)
        facts.attach(module)
        module = guard_inputs(module)
        plans = {layer: plan for layer, (plan, _) in planned(module).items()}
        for plan in plans.values():
            check_plan(plan)
        check(QuantGraph.of(module), "after load")
        check_stored(module, values=values)
        rehearse(module, stand_ins(module, manifest.inputs, facts.inputs))
        sizes = None if manifest.inputs is None else [tuple(entry.example) for entry in manifest.inputs]
        check_encoded(module, sizes, facts.recipe, values=values)
    except (OSError, RuleError, ValueError) as error:
        raise BundleError(f"{folder / GRAPH}: {error}") from error
    stated = {layer: (entry.plan, set(entry.tensors)) for layer, entry in manifest.layers.items()}
    if {layer: (plan.to_json(), set(_own(plan, tensors))) for layer, plan in plans.items()} != stated:
        raise BundleError(
            f"{folder}: the plans on the graph differ from the manifest's layers; the bundle is inconsistent"
        )
    return module
