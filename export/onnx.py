"""ONNX with stored integers, in standard operators, and the check that ONNX Runtime multiplies integers with it."""

from __future__ import annotations

import collections
import dataclasses
import glob
import hashlib
import importlib
import json
import os
import pathlib
import tempfile
import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

import fxq.kernels  # noqa: F401 registers the operators
from fxq import cpu
from fxq.core.aliasing import written_inputs
from fxq.core.ir import LayerPlan, get_tensor
from fxq.core.signature import call_rules, rules_of
from fxq.export.capture import Example, ExportError, capture, lower, plain_metadata
from fxq.export.onnx_form import WEIGHTS, integer_form, tensorrt_faults
from fxq.passes.qdq.qdq_layers import may_saturate
from fxq.runtime.exclusive import exclusive, quiet
from fxq.runtime.messages import first_line
from fxq.version import __version__

if TYPE_CHECKING:
    import onnx
    import onnx_ir

OPSET = 21
TARGETS = ("onnxruntime", "tensorrt")
"""What files are written for; OpenVINO reads those for ONNX Runtime."""
EXTERNAL_ABOVE = 1 << 31
"""Bytes of tensors that no longer fit into one protobuf file."""
DEQUANTIZE = "DequantizeLinear"
KERNELS = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "MatMulInteger", "DynamicQuantizeMatMul"})
"""Operators of ONNX Runtime that multiply integers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxLayer:
    """A quantized layer of an ONNX file: the kernel ONNX Runtime gave it and its number of products."""

    layer: str
    bits: int
    kernel: str
    products: int


@exclusive
def export_onnx(
    module: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    example: Example | None = None,
    metadata: Mapping[str, object] | None = None,
    external_above: int = EXTERNAL_ABOVE,
    vnni: bool | None = None,
    in_halves: bool = False,
    target: str = TARGETS[0],
) -> pathlib.Path:
    """Write a quantized float32 module as ONNX (opset 21, no custom operators).

    Inputs are named as the module's arguments, list members ``name_0``, ``name_1`` and so on; outputs ``output`` with
    their position; where a name is taken, a ``_`` more. Sizes that vary in the module vary in the file. ONNX Runtime
    refuses other ranks, dtypes and fixed sizes by itself, not what breaks a condition between sizes: those stand in the
    metadata. 4-bit weights are stored as INT4 and cast to INT8 when a session is made, because integer kernels read
    bytes. The file's metadata have an entry ``fxq``: version, quantized layers, ``call`` (what the module may be called
    with) and ``metadata``.

    x86 CPUs without VNNI saturate products of 8-bit activations (unsigned) and 8-bit weights (signed), in every
    runtime. A file for them has unsigned weights: exact on every CPU, faster than float32 there, and several times
    slower than the other form on CPUs with VNNI. Layers of fewer bits have one form for all. In halves of 7
    bits, each with a product of its own, weights are exact on every CPU too, and fast on those with VNNI.

    A file for TensorRT has signed activations around zero, quantized and dequantized with one scale, and 4-bit weights
    in bytes: what that parser takes (:func:`~fxq.export.onnx_form.tensorrt_faults`).

    Args:
        module: of :func:`fxq.quantize` or :func:`fxq.load`.
        path: the .onnx file, replaced when it exists.
        example: a call and its dynamic shapes, needed for a loaded module.
        metadata: JSON values for the program that runs the file.
        external_above: from this many bytes on, tensors lie in a second file ``<path>.<hash>.data``.
        vnni: whether the x86 CPUs that will run the file have VNNI; None: as the one that exports it.
        in_halves: whether 8-bit weights are stored as sums of two of 7 bits, for a file for both kinds of CPUs.
        target: what will run it, one of :data:`TARGETS`.

    Returns:
        The path.

    Raises:
        ExportError: when the module cannot be exported, a package is missing, the target is unknown, or forms are named
            that exclude each other or that a target on GPUs has not.
    """
    _check_form(target, vnni, in_halves)
    ir = _package("onnx_ir")
    _package("onnxscript")
    runtime = plain_metadata(metadata)
    for_vnni = not cpu.saturates() if vnni is None else vnni
    on_gpu = target == "tensorrt"
    graph = lower(module, in_halves, signed=on_gpu)
    _refuse_half(graph.module)
    plans = graph.quantized_plans
    _refuse_writes(graph.module)
    program = capture(graph.module, example)
    model = _convert(program, graph.module)
    integer_form(model, plans, for_vnni or on_gpu or in_halves, nibbles=not on_gpu)
    if on_gpu and (faults := tensorrt_faults(ir.serde.serialize_model(model))):
        raise ExportError(f"TensorRT would refuse the file: {'; '.join(faults[:4])}")
    rules = rules_of(module) or call_rules(module)
    facts = _facts(plans, for_vnni and not (on_gpu or in_halves), runtime)
    facts |= {"call": {"names": list(rules.names)} | rules.to_json()}
    if target != TARGETS[0]:
        facts |= {"target": target}
    model.metadata_props["fxq"] = json.dumps(facts)
    return _write(ir, model, pathlib.Path(path).absolute(), external_above)


def _check_form(target: str, vnni: bool | None, in_halves: bool) -> None:
    if target not in TARGETS:
        raise ExportError(f"unknown target {target!r} of an ONNX file: expected one of {', '.join(TARGETS)}")
    if target == "tensorrt" and (in_halves or vnni is not None):
        raise ExportError("vnni and in_halves are about x86 CPUs, TensorRT runs on GPUs: leave them out")
    if in_halves and vnni is not None:
        raise ExportError("in_halves is one form for CPUs with VNNI and without: leave vnni out")


def _package(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ExportError(f"the ONNX export needs the package {name}: pip install 'fxq[onnx]'") from None


def _refuse_half(module: fx.GraphModule) -> None:
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = get_tensor(module, str(node.target))
        if tensor.dtype in (torch.bfloat16, torch.float16):
            raise ExportError(
                f"{node.target} is {tensor.dtype}: ONNX Runtime's CPU kernels are float32; quantize the model after "
                ".float() and export that"
            )


def _refuse_writes(module: fx.GraphModule) -> None:
    """ONNX has values only: the caller's tensor would stay as it was."""
    if names := sorted(node.name for node in written_inputs(module.graph)):
        raise ExportError(
            f"the model writes to its input {', '.join(names[:4])} in place, which an ONNX file cannot: return the new "
            "value from the forward instead"
        )


def _facts(plans: Mapping[str, LayerPlan], vnni: bool, runtime: dict[str, object]) -> dict[str, object]:
    schemes = {layer: plan.scheme for layer, plan in plans.items() if plan.scheme is not None}
    layers = {layer: scheme.weight_bits for layer, scheme in schemes.items()}
    needs = [layer for layer, scheme in schemes.items() if vnni and may_saturate(scheme)]
    return {"fxq_version": __version__, "layers": layers, "needs_vnni": needs, "runtime": runtime}


def output_names(spec: pytree.TreeSpec, inputs: Iterable[str] = ()) -> list[str]:
    """A name for each value of a nested output: ``output``, with its keys or positions behind.

    Where that is the name of an input, or of an output before it, there is a ``_`` more.
    """
    numbered = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    leaves, _ = pytree.tree_flatten_with_path(numbered)
    taken, names = set(inputs), []
    for keys, _ in leaves:
        name = "_".join(["output", *(str(getattr(key, "idx", getattr(key, "key", key))) for key in keys)])
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


def _convert(program: torch.export.ExportedProgram, module: fx.GraphModule) -> onnx_ir.Model:
    inputs = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    spec = program.call_spec.out_spec
    assert spec is not None
    names = output_names(spec, inputs)
    try:
        with quiet("torch.onnx"):
            done = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False, input_names=inputs, output_names=names
            )
    except Exception as error:
        raise ExportError(f"torch.onnx cannot convert the graph: {first_line(error)}") from error
    assert done is not None
    return done.model


def _write(ir: types.ModuleType, model: onnx_ir.Model, path: pathlib.Path, external_above: int) -> pathlib.Path:
    """Write beside the place and rename: a reader sees the old files or the new ones."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            part, data = pathlib.Path(folder) / path.name, None
            if size >= external_above:
                data = _external_name(model, path)
                ir.save(model, part, external_data=data, size_threshold_bytes=1024)
                os.replace(part.with_name(data), path.with_name(data))
            else:
                ir.save(model, part)
            os.replace(part, path)
        for old in path.parent.glob(f"{glob.escape(path.name)}.????????.data"):
            if old.name != data:
                old.unlink()
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}") from error
    return path


def _external_name(model: onnx_ir.Model, path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for value in model.graph.initializers.values():
        digest.update(value.const_value.tobytes())
    return f"{path.name}.{digest.hexdigest()[:8]}.data"


def check_onnx(path: str | os.PathLike[str]) -> list[OnnxLayer]:
    """Let ONNX Runtime optimize a file for this CPU and see which kernel every quantized layer got.

    Args:
        path: of :func:`export_onnx`.

    Returns:
        One entry per quantized layer, in the file's order. Of a file for TensorRT the rules of its parser are
        checked instead, and the kernel is ``tensorrt``.

    Raises:
        ExportError: when the file cannot be read, was not written by fxq, a layer would be multiplied in floats, a rule
            of TensorRT is broken, or this CPU would compute one wrong: a file that needs VNNI on an x86 CPU without.
    """
    model, optimized, facts = _read(os.fspath(path))
    if facts.get("target") == "tensorrt":
        return _check_tensorrt(model, facts["layers"], os.fspath(path))
    layers: dict[str, int] = facts["layers"]
    owners = _owners(model, layers)
    found: dict[str, list[str]] = {layer: [] for layer in layers}
    for node in optimized.graph.node:
        if node.op_type in KERNELS:
            for layer in {owners[name] for name in node.input if name in owners}:
                found[layer].append(node.op_type)
    expected = _products(model, owners)
    if missing := [layer for layer, kinds in found.items() if not 0 < expected[layer] <= len(kinds)]:
        raise ExportError(
            f"{os.fspath(path)}: ONNX Runtime multiplies floats in {len(missing)} of {len(found)} "
            f"quantized layers: {', '.join(missing[:4])}"
        )
    # Files of older versions do not say it: they have no form for CPUs without VNNI.
    needs = facts.get("needs_vnni", [layer for layer, bits in layers.items() if bits == 8])
    if needs and cpu.saturates():
        raise ExportError(
            f"{os.fspath(path)} is right, and this CPU would compute it wrong: {cpu.lacks()}, and ONNX Runtime "
            f"saturates sums of two products at 16 bits in {len(needs)} of {len(layers)} quantized layers: "
            f"{', '.join(needs[:4])}. Export with vnni=False for such CPUs, or run this file with the session option "
            "session.x64quantprecision = 1"
        )
    return [
        OnnxLayer(layer=layer, bits=layers[layer], kernel=kinds[0], products=len(kinds))
        for layer, kinds in found.items()
    ]


def _check_tensorrt(model: onnx.ModelProto, layers: Mapping[str, int], file: str) -> list[OnnxLayer]:
    if faults := tensorrt_faults(model):
        raise ExportError(f"{file}: TensorRT would refuse it: {'; '.join(faults[:4])}")
    products = _products(model, _owners(model, layers))
    return [OnnxLayer(layer=n, bits=bits, kernel="tensorrt", products=products[n]) for n, bits in layers.items()]


def _read(file: str) -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, Any]]:
    """The model, what ONNX Runtime makes of it, and the facts fxq wrote into it."""
    onnx, runtime = _package("onnx"), _package("onnxruntime")
    try:
        model = onnx.load(file, load_external_data=False)
        onnx.checker.check_model(file)
        facts = json.loads(next(p.value for p in model.metadata_props if p.key == "fxq"))
        # What ONNX Runtime makes of a file for TensorRT says nothing about that.
        optimized = model if facts.get("target") == "tensorrt" else _optimized(onnx, runtime, file)
        return model, optimized, facts | {"layers": dict(facts["layers"])}
    except StopIteration:
        raise ExportError(f"{file} has no fxq entry in its metadata; it was not written by fxq.export_onnx") from None
    except Exception as error:
        raise ExportError(f"{file} cannot be loaded: {error}") from error


def _owners(model: onnx.ModelProto, layers: Mapping[str, int]) -> dict[str, str]:
    """Layer of each integer weight, by the names it may have in an optimized model: stored, and cast to INT8."""
    stored = {tensor.name for tensor in model.graph.initializer}
    owners: dict[str, str] = {}
    for layer in layers:
        for name in (f"{layer}.{part}" for part in WEIGHTS):
            if name in stored:
                owners |= {name: layer, f"{name}_int8": layer}
    return owners


def _products(model: onnx.ModelProto, owners: Mapping[str, str]) -> collections.Counter[str]:
    """How often the file multiplies with each layer's weights."""
    floats = {
        n.output[0]: owners[n.input[0]] for n in model.graph.node if n.op_type == DEQUANTIZE and n.input[0] in owners
    }
    return collections.Counter(
        floats[n.input[1]] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in floats
    )


def _optimized(onnx: types.ModuleType, runtime: types.ModuleType, file: str) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.optimized_model_filepath = str(pathlib.Path(folder) / "optimized.onnx")
        options.log_severity_level = 3
        for key, value in (("file_name", "tensors"), ("min_size_in_bytes", "1024")):
            options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
        runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath, load_external_data=False)
