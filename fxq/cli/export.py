"""Commands that bring a bundle to other runtimes and that check one."""

from __future__ import annotations

import pathlib
from typing import Annotated, Any, Literal, NamedTuple

import typer

from fxq import cpu, plugins
from fxq.cli.options.common import JsonOption, bundle_folder, emit_json
from fxq.dtypes import DTYPES
from fxq.export import BundleError, export_onnx, load, save_diffusers, verify_bundle
from fxq.export.interop import OTHER_TARGETS, TARGETS, Options, export_bundle
from fxq.models.checkpoints import read_tensors
from fxq.models.diffusers_folder import load_folder
from fxq.runtime.reading import ReadError, read_json
from fxq.runtime.streams import stdout_console
from fxq.runtime.writable import writable_file, writable_folder

ONNX_FILES = {"onnx": "onnxruntime", "tensorrt": "tensorrt"}
"""Targets that are ONNX files, by what runs them."""
SHIPPED_TARGETS = (*OTHER_TARGETS, *TARGETS)
"""What ``--target`` takes beside the names of plug-ins."""

BundleArgument = Annotated[
    pathlib.Path, typer.Argument(help="Bundle folder made by `fxq quantize`, or org/name[@revision] of the hub.")
]


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        emit_json(result.to_json())
    else:
        stdout_console().print(result)


def export(
    bundle: BundleArgument,
    target: Annotated[
        str, typer.Option(help=f"The runtime that is to read it: {', '.join(SHIPPED_TARGETS)}, or a plug-in's name.")
    ],
    out: Annotated[pathlib.Path, typer.Option(help="Folder to write; for onnx and tensorrt the file.")],
    float_dtype: Annotated[
        Literal["keep", "bfloat16", "float16", "float32"],
        typer.Option(help="Dtype of tensors that stay in floating point."),
    ] = "keep",
    widen_int4: Annotated[
        bool, typer.Option("--widen-int4", help="Store 4-bit weights in a byte where the target has no 4 bits.")
    ] = False,
    base_config: Annotated[
        pathlib.Path | None, typer.Option(help="The model's own config.json, to be completed for the target.")
    ] = None,
    original: Annotated[
        pathlib.Path | None,
        typer.Option(help="The float weights that were quantized, for formats that round them in their own way."),
    ] = None,
    causal: Annotated[
        bool | None,
        typer.Option(
            "--causal/--no-causal", help="Whether it generates chunk by chunk; as its inputs show when absent."
        ),
    ] = None,
    per_block: Annotated[
        bool, typer.Option("--per-block", help="For lightx2v: a file per block, for lazy_load.")
    ] = False,
    source: Annotated[pathlib.Path | None, typer.Option(help="For diffusers: the folder that was quantized.")] = None,
    vnni: Annotated[
        bool | None,
        typer.Option(
            "--vnni/--no-vnni",
            help="For onnx: whether the x86 CPUs that will run it have VNNI; as this one when absent. Without, 8-bit "
            "products of a file with --vnni saturate.",
        ),
    ] = None,
    in_halves: Annotated[
        bool,
        typer.Option(
            "--in-halves", help="For onnx: 8-bit weights as two of 7 bits, one file for CPUs with VNNI and without."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a bundle in the format of another runtime and say what that costs per layer."""
    _check_target(target)
    bundle = bundle_folder(bundle)
    if target in ONNX_FILES:
        _export_onnx(bundle, out, target, OnnxForm(vnni=vnni, in_halves=in_halves), as_json)
        return
    if vnni is not None or in_halves:
        raise BundleError(f"--vnni, --no-vnni and --in-halves are for target onnx, not {target}")
    writable_folder(out)
    if target == "diffusers":
        _export_diffusers(bundle, source, out, as_json)
        return
    dtype = None if float_dtype == "keep" else DTYPES[float_dtype]
    options = Options(
        float_dtype=dtype,
        widen=widen_int4,
        base_config=_read_config(base_config),
        original=None if original is None else read_tensors(original),
        causal=causal,
        per_block=per_block,
    )
    _print(export_bundle(bundle, target, out, options), as_json)


def _check_target(target: str) -> None:
    """Refuse an unknown name as wrong usage, and one that two targets have."""
    known = (*SHIPPED_TARGETS, *plugins.names(plugins.EXPORTS))
    if target not in known:
        raise typer.BadParameter(f"{target!r} is none of {', '.join(known)}", param_hint="--target")
    plugins.find(plugins.EXPORTS, target, SHIPPED_TARGETS)


class OnnxForm(NamedTuple):
    """Which of the forms for x86 CPUs an ONNX file is to have."""

    vnni: bool | None
    in_halves: bool


def _export_onnx(bundle: pathlib.Path, out: pathlib.Path, target: str, form: OnnxForm, as_json: bool) -> None:
    file = export_onnx(load(bundle), writable_file(out), target=ONNX_FILES[target], **form._asdict())
    if target == "tensorrt":
        said, line = {"runtime": target}, "for TensorRT"
    else:
        anywhere = form.in_halves or (cpu.saturates() if form.vnni is None else not form.vnni)
        cpus = "every CPU" if anywhere else "CPUs with VNNI, where 8-bit layers do not saturate"
        said, line = {"cpus": cpus}, f"for ONNX Runtime and OpenVINO on {cpus}"
    if as_json:
        emit_json({"file": str(file), **said})
    else:
        stdout_console().print(f"{file}: {line}", markup=False, highlight=False, soft_wrap=True)


def _export_diffusers(bundle: pathlib.Path, source: pathlib.Path | None, out: pathlib.Path, as_json: bool) -> None:
    if source is None:
        raise BundleError("target diffusers needs --source, the folder that was quantized: the model's class is there")
    folder = save_diffusers(bundle, load_folder(source), out)
    if as_json:
        emit_json({"folder": str(folder), "reader": "fxq.register()"})
    else:
        stdout_console().print(
            f"{folder}: for from_pretrained, after fxq.register()", markup=False, highlight=False, soft_wrap=True
        )


def _read_config(path: pathlib.Path | None) -> dict[str, object]:
    if path is None:
        return {}
    try:
        config = read_json(path)
    except (OSError, ReadError) as error:
        raise BundleError(f"{path} cannot be read as a model's config.json: {error}") from error
    if not isinstance(config, dict):
        raise BundleError(f"{path} is not a model's config.json: expected a JSON object")
    return config


def verify(
    bundle: BundleArgument,
    device: Annotated[str, typer.Option(help="Where it is to run: cpu or cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Check a bundle: hashes, schema, layers, one call, the kernels that run. Exit code 1 on any failure."""
    verdict = verify_bundle(bundle_folder(bundle), device)
    _print(verdict, as_json)
    if not verdict.ok:
        raise typer.Exit(1)
