"""Programs of torch.export: weight-free with safetensors beside it, or compiled ahead of time; a folder each.

``program.pt2`` is what torch reads, ``program.json`` says what is there. A weight-free program is a bundle too, and
:func:`load_program` runs the bundle's graph: ``torch.export.load`` unpickles example inputs and evaluates the
expressions of sizes as Python, so it is for files one trusts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx
from torch.export import ExportedProgram

import fxq.kernels  # noqa: F401 registers the operators
from fxq import cpu
from fxq.core.ir import get_tensor
from fxq.export import bundle
from fxq.export.capture import CACHE, INTEGERS, Example, ExportError, capture, frozen, lower, plain_metadata
from fxq.export.compiled import KEY, call_facts, compiled_program
from fxq.export.files import BundleError, sha256, whole_folder, write_tensors
from fxq.export.graph.strict import Name, SchemaError, Size, Text, validated
from fxq.export.machine_code import compiled_for, march_setting, refuse_other_cpu
from fxq.export.native_code import load_native, note_as_own
from fxq.kernels.op import NAMESPACE
from fxq.passes.match.cache_inputs import TABLES, Packing, TakesCache
from fxq.runtime.exclusive import exclusive, quiet
from fxq.runtime.messages import first_line
from fxq.runtime.reading import ReadError, read_json, regular_file
from fxq.version import __version__

PROGRAM, FACTS = "program.pt2", "program.json"
CACHE_TENSORS = "cache.safetensors"
"""What the codecs of a compiled program learned from calibration, for those who encode."""
BUNDLE = (bundle.MANIFEST, bundle.TENSORS, bundle.GRAPH)
FORMAT_VERSION = 1
WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default
ENTRIES = ("denoise", "context")
"""Names of a compiled program's graph: a denoising step and the call that writes clean keys and values."""


@exclusive
def export_program(
    module: fx.GraphModule,
    path: str | os.PathLike[str],
    aoti: bool = False,
    *,
    example: Example | None = None,
    metadata: Mapping[str, object] | None = None,
) -> pathlib.Path:
    """Write a quantized module as a program of torch.export. The folder appears whole or not at all.

    Without ``aoti`` the folder is a bundle with ``program.pt2``, the graph without tensors. With it ``program.pt2`` is
    an AOTInductor package with the entries ``denoise`` and ``context``, compiled for this machine. On a CPU it holds no
    operator of fxq and runs in a process that imports torch alone; on CUDA the process imports fxq for its kernels, and
    on either to read an encoded or absorbed cache.
    Compiled on an x86 CPU without VNNI, 8-bit weights are multiplied in two halves, which is exact there.

    Args:
        module: of :func:`fxq.quantize` or :func:`fxq.load`.
        path: the folder; one that this function wrote is replaced.
        aoti: compile ahead of time.
        example: a call and its dynamic shapes, for a module without recorded values.
        metadata: JSON values for the program that runs it, stored as ``runtime``.

    Returns:
        The folder.

    Raises:
        ExportError: when the module cannot be exported or written.
    """
    out, runtime = pathlib.Path(path).absolute(), plain_metadata(metadata)
    try:
        with whole_folder(out, (PROGRAM, FACTS, CACHE_TENSORS, *BUNDLE), "a program") as part:
            extra = _write_compiled(module, part, example) if aoti else _write_weight_free(module, part, example)
            more = (CACHE_TENSORS,) if (part / CACHE_TENSORS).exists() else ()
            hashes = {name: sha256(part / name) for name in (PROGRAM, *(more if aoti else BUNDLE))}
            facts = _facts(aoti, runtime, hashes) | extra | ({KEY: call_facts(module)} if aoti else {})
            (part / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    except BundleError as error:
        raise ExportError(str(error)) from error
    if aoti:
        note_as_own(hashes[PROGRAM])
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cache:
    """What a compiled program takes of a cache, see :class:`fxq.passes.match.cache_inputs.TakesCache`."""

    arguments: Annotated[list[Name], Field(max_length=10)]
    codecs: Annotated[list[Text], Field(max_length=10_000)]
    spans: Annotated[list[Size], Field(max_length=10_000)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Facts:
    """What ``program.json`` holds beside version and kind."""

    fxq_version: Text
    torch_version: Text
    files: dict[Name, Text]
    runtime: dict[str, object]
    imports: Annotated[list[Name], Field(max_length=10)]
    integer_products: Size = 0
    cache: _Cache | None = None


def _facts(aoti: bool, runtime: dict[str, object], files: dict[str, str]) -> dict[str, object]:
    return {
        "format_version": FORMAT_VERSION,
        "fxq_version": __version__,
        "torch_version": torch.__version__.partition("+")[0],
        "kind": "aoti" if aoti else "weight_free",
        "entries": list(ENTRIES if aoti else ("model",)),
        "files": files,
        "runtime": runtime,
    }


def _device(module: fx.GraphModule) -> torch.device:
    nodes = module.graph.find_nodes(op="get_attr")
    return get_tensor(module, str(nodes[0].target)).device


def _write_weight_free(module: fx.GraphModule, folder: pathlib.Path, example: Example | None) -> dict[str, object]:
    program = capture(frozen(module).module, example)
    bundle.save(module, folder)
    for name, tensor in list(program.state_dict.items()):
        empty: Tensor = torch.empty_like(tensor, device="meta")
        trained = isinstance(tensor, torch.nn.Parameter)
        program.state_dict[name] = torch.nn.Parameter(empty, tensor.requires_grad) if trained else empty
    program._example_inputs = None
    with quiet("torch.export"):
        torch.export.save(program, folder / PROGRAM)
    return {"imports": ["torch", "fxq"]}


def _write_compiled(module: fx.GraphModule, folder: pathlib.Path, example: Example | None) -> dict[str, object]:
    from torch._inductor.package.package import package_aoti

    on_cpu = _device(module).type == "cpu"
    graph = lower(module, in_halves=cpu.saturates(), keeps=CACHE | INTEGERS) if on_cpu else frozen(module)
    files = [pathlib.Path(file) for file in _compile(capture(graph.module, example))]
    products = len(graph.module.graph.find_nodes(op="call_function", target=WEIGHT)) if on_cpu else 0
    source = "".join(file.read_text(encoding="utf-8") for file in files if file.name.endswith("wrapper.cpp"))
    if (integer := len(re.findall(r"aoti_torch_cpu__qlinear_\w+\(", source))) < products:
        raise ExportError(f"AOTInductor multiplies floats in {products - integer} of {products} quantized products")
    kept: list[Any] = [str(file) for file in files if file.suffix != ".cpp"]  # sources name paths of this machine
    with quiet("torch.export"):
        package_aoti(str(folder / PROGRAM), dict.fromkeys(ENTRIES, kept))
    own = [node for node in graph.module.graph.nodes if str(node.target).startswith(f"{NAMESPACE}.")]
    facts: dict[str, object] = {"imports": ["torch", "fxq"] if own else ["torch"]}
    taken = TakesCache.of(module)
    if taken.arguments:
        packing = taken.packing or Packing((), ())
        facts["cache"] = {"arguments": taken.arguments, "codecs": packing.codecs, "spans": packing.spans}
    if taken.tables:
        write_tensors(taken.tables, folder / CACHE_TENSORS, {"format": "pt"})
    return facts | {"integer_products": integer, "cpu": compiled_for()}


def _compile(program: ExportedProgram) -> list[str]:
    """Files of the compiled graph; freezing lays int8 weights out for the CPU's kernels."""
    from torch import _inductor

    module = program.module(check_guards=False)
    args, kwargs = program.example_inputs
    settings = {"aot_inductor.package": True, "freezing": True}
    try:
        with (
            torch.no_grad(),
            _inductor.config.patch({"freezing": True} | march_setting()),
            quiet("torch.export"),
        ):
            found = _inductor.aot_compile(module, args, kwargs, options=settings)
    except Exception as error:
        raise ExportError(f"AOTInductor cannot compile the graph: {first_line(error)}") from error
    assert isinstance(found, list)
    return [file for file in found if isinstance(file, str)]


def read_program(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Facts of a program, its files compared with their hashes.

    Raises:
        ExportError: when a file is missing, truncated, altered or of another format or torch version.
    """
    folder = pathlib.Path(path)
    file = folder / FACTS
    try:
        facts = read_json(file, folder)
    except OSError as error:
        raise ExportError(f"{file}: {error.strerror or error}; expected a folder made by fxq.export_program") from error
    except ReadError as error:
        raise ExportError(f"{file}: {error}; the program is damaged, export it again") from error
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ExportError(
            f"{file}: format version {repr(version)[:40]}, this fxq reads {FORMAT_VERSION}; export it again"
        )
    files, kind = facts.get("files"), facts.get("kind")
    wanted = {PROGRAM, *(BUNDLE if kind == "weight_free" else ())}
    allowed = wanted | ({CACHE_TENSORS} if kind == "aoti" else set())
    if kind not in ("aoti", "weight_free") or not isinstance(files, dict) or not wanted <= set(files) <= allowed:
        shown = f"kind {repr(kind)[:40]} with files {str(files)[:200]}"
        raise ExportError(f"{file}: {shown}; the program is damaged, export it again")
    if facts.get("entries") != list(ENTRIES if kind == "aoti" else ("model",)):
        shown = f"entries {str(facts.get('entries'))[:80]} of a program of kind {kind}"
        raise ExportError(f"{file}: {shown}; the program is damaged, export it again")
    try:
        validated(_Facts, facts)
    except SchemaError as error:
        raise ExportError(f"{file}: {error}; the program is damaged, export it again") from error
    for name, digest in files.items():
        _check_hash(folder, name, digest)
    here = torch.__version__.partition("+")[0]
    if kind == "aoti" and facts.get("torch_version") != here:
        raise ExportError(f"{folder}: compiled by torch {facts.get('torch_version')}, this is {here}; export it again")
    return dict(facts)


def _check_hash(folder: pathlib.Path, name: str, digest: str) -> None:
    try:
        found = sha256(regular_file(folder / name, folder))
    except FileNotFoundError as error:
        raise ExportError(f"{folder / name} is missing; copy the whole folder") from error
    except (OSError, ReadError) as error:
        raise ExportError(f"{folder / name} cannot be read: {error}") from error
    if found != digest:
        raise ExportError(
            f"{folder / name} does not have the hash that {FACTS} states: truncated or altered; copy it again"
        )


def load_program(
    path: str | os.PathLike[str],
    entry: str = "denoise",
    device: str | torch.device = "cpu",
    *,
    allow_native_code: bool = False,
) -> Callable[..., Any]:
    """A callable with the module's arguments and results, which refuses calls that the module was not captured for.

    Of a weight-free program nothing is unpickled and no code of the file runs. A compiled one is machine code: it is
    loaded where this user exported it (:mod:`fxq.export.native_code` keeps note), or with your word.

    Args:
        path: folder of :func:`export_program`.
        entry: of a compiled program.
        device: where a weight-free program's tensors go.
        allow_native_code: load a compiled program of somebody else; say so only for one from where you would install
            software.

    Raises:
        ExportError: as :func:`read_program`, for an unknown entry, when a program was compiled for another CPU, or for
            a compiled program of somebody else without your word.
    """
    folder = pathlib.Path(path)
    facts = read_program(folder)
    if facts["kind"] == "weight_free":
        try:
            return bundle.load(folder, device)
        except BundleError as error:
            raise ExportError(str(error)) from error
    if entry not in ENTRIES:
        raise ExportError(f"entry {entry!r}: expected one of {', '.join(ENTRIES)}")
    refuse_other_cpu(folder / FACTS, facts)
    run = load_native(folder, PROGRAM, facts["files"][PROGRAM], entry, allow_native_code)
    return dataclasses.replace(compiled_program(run, facts, str(folder)), takes_cache=_takes_cache(folder, facts))


def _takes_cache(folder: pathlib.Path, facts: Mapping[str, Any]) -> TakesCache:
    """What a compiled program takes of a cache, and what it holds for its codecs."""
    if (stated := facts.get("cache")) is None:
        return TakesCache()
    packing = Packing(tuple(stated["codecs"]), tuple(stated["spans"])) if TABLES[0] in stated["arguments"] else None
    tables: dict[str, Tensor] = {}
    if CACHE_TENSORS in facts["files"]:
        try:
            with safe_open(regular_file(folder / CACHE_TENSORS, folder), "pt") as file:
                tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not iterable
        except (OSError, ReadError, RuntimeError, SafetensorError) as error:
            raise ExportError(f"{folder / CACHE_TENSORS} cannot be read: {error}") from error
    return TakesCache(tuple(stated["arguments"]), packing, tables)
