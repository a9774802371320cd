"""Formats that other runtimes read, written from a bundle. One file per target.

Nothing here rounds in silence: the integers are those of the bundle where a format can hold them. Where its grid is
another, the original weights are rounded to it if the caller gives them; a second rounding is refused or reported.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable

from rich.console import Console, ConsoleOptions, RenderResult

from fxq import plugins
from fxq.export.files import whole_folder, write_tensors
from fxq.export.interop import comfy, compressed_tensors, diffusers_torchao, lightx2v, sglang, vllm_omni
from fxq.export.interop.layers import (
    MERGED,
    PER_TENSOR,
    InteropError,
    LayerRecord,
    Options,
    Output,
    StoredLayer,
    StoredModel,
    read_model,
)
from fxq.export.interop.names import OWN
from fxq.export.interop.original import with_originals
from fxq.runtime.streams import as_text
from fxq.runtime.tables import Justify, Sheet

Target = Callable[[StoredModel, Options], Output]
TARGETS: dict[str, Target] = {
    "lightx2v": lightx2v.build,
    "vllm-omni": vllm_omni.build,
    "comfy": comfy.build,
    "sglang": sglang.build,
    "compressed-tensors": compressed_tensors.build,
    "diffusers-torchao": diffusers_torchao.build,
}
"""The shipped targets by name; others come by :mod:`fxq.plugins`."""
FLOAT8 = ("comfy", "compressed-tensors", "diffusers-torchao", "lightx2v", "vllm-omni")
"""Targets whose format holds float8."""
ROTATING = ("comfy", "sglang")
"""Targets that rotate inputs as :class:`~fxq.passes.transforms.conv_rot.ConvRot` does."""
OTHER_TARGETS = ("diffusers", "onnx", "tensorrt")
"""Targets with a writer of their own, whose names no plug-in may have."""
REPORT = "fxq_report.json"

__all__ = [
    "OTHER_TARGETS",
    "REPORT",
    "TARGETS",
    "ExportReport",
    "InteropError",
    "LayerRecord",
    "Options",
    "Output",
    "StoredLayer",
    "StoredModel",
    "Target",
    "export_bundle",
    "find_target",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote and what it cost, layer by layer; lies beside it as ``fxq_report.json``.

    ``source`` is the sha256 of the bundle's tensors, ``activations`` says what the target does to inputs.
    """

    target: str
    source: str
    files: tuple[str, ...]
    activations: str
    layers: tuple[LayerRecord, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """JSON form."""
        return dataclasses.asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        compared = any(record.original_sqnr_db is not None for record in self.layers)
        columns: dict[str, Justify] = {"layer": "left", "form": "left", "weight SQNR dB": "right"}
        sheet = Sheet(
            f"{self.target}: {', '.join(self.files)}",
            columns | ({"of the original": "right"} if compared else {}),
            "note",
        )
        for record in self.layers:
            changed = "-" if record.form == "float" else "exact"
            cost = changed if record.weight_sqnr_db is None else f"{record.weight_sqnr_db:.1f}"
            original = "-" if record.original_sqnr_db is None else f"{record.original_sqnr_db:.1f}"
            cells = (record.name, record.form, cost, *([original] if compared else []))
            sheet.add(*cells, note=record.note, style="dim" if record.form == "float" else None)
        yield sheet
        yield f"activations: {self.activations}"
        yield from self.notes

    def __str__(self) -> str:
        return as_text(self)


def export_bundle(
    path: str | os.PathLike[str], target: str, out: str | os.PathLike[str], options: Options | None = None
) -> ExportReport:
    """Write a bundle in the format of another runtime. The folder appears whole or not at all.

    Args:
        path: folder written by :func:`fxq.save`.
        target: one of :data:`TARGETS`, or a plug-in's.
        out: folder to write; an older export of the same target there is replaced.
        options: see :class:`Options`.

    Returns:
        What became of every linear; the same lies in ``out`` as ``fxq_report.json``.

    Raises:
        InteropError: unknown target, a plug-in that cannot be used, or a bundle that its format cannot hold.
        BundleError: the bundle is damaged, or ``out`` cannot be written.
    """
    build = find_target(target)
    model = read_model(path, rotated=target in ROTATING)
    if not model.layers:
        raise InteropError(f"{path} has no quantized layer; there is nothing to export")
    _refuse_float8(model, target)
    chosen = options or Options()
    result = build(with_originals(model, chosen.original), chosen)
    files = (*result.tensors, *result.documents)
    report = ExportReport(
        target=target,
        source=model.receipt.source,
        files=files,
        activations=_activations(model, result),
        layers=tuple(result.records),
        notes=_notes(model, chosen, result),
    )
    with whole_folder(out, (*files, REPORT), "an export") as folder:
        for name, (tensors, metadata) in result.tensors.items():
            write_tensors(tensors, folder / name, metadata | model.receipt.to_header())
        for name, document in {**result.documents, REPORT: report.to_json()}.items():
            (folder / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return report


def _refuse_float8(model: StoredModel, target: str) -> None:
    floats = [name for name, layer in model.layers.items() if layer.is_float8]
    if floats and target not in FLOAT8:
        raise InteropError(
            f"{len(floats)} layers are FP8 ({', '.join(floats[:3])}), and the target {target} writes integers: take "
            f"one of {', '.join(FLOAT8)}, or quantize with w8a8 or w8a8-dynamic"
        )


def find_target(name: str) -> Target:
    """What writes a target's format: a shipped function, or one of a plug-in, which is imported for it.

    Raises:
        InteropError: when there is no such target, or its plug-in cannot be used.
    """
    try:
        plugin = plugins.find(plugins.EXPORTS, name, (*TARGETS, *OTHER_TARGETS))
        if plugin is not None:
            found: Target = plugin.load()
            return found
    except plugins.PluginError as error:
        raise InteropError(str(error)) from error
    if name not in TARGETS:
        known = (*TARGETS, *plugins.names(plugins.EXPORTS))
        raise InteropError(f"unknown target {name!r}: expected one of {', '.join(known)}")
    return TARGETS[name]


def _activations(model: StoredModel, result: Output) -> str:
    """What the target does to inputs, and what of the bundle it therefore leaves unused."""
    schemes = [layer.plan.scheme for layer in model.layers.values()]
    if result.static or all(scheme is not None and scheme.per_token for scheme in schemes):
        return f"{result.activations}, as in the bundle"
    return f"{result.activations}; the static input scales and zero points of the bundle are not used"


def _notes(model: StoredModel, options: Options, result: Output) -> tuple[str, ...]:
    notes = []
    if model.naming.style == OWN:
        notes.append("the model's names are not Wan's; they are written unchanged")
    if model.constants:
        notes.append(f"constants of the captured graph are left out: {', '.join(model.constants)}")
    if "config.json" in result.documents and not options.base_config:
        notes.append("config.json holds the quantization_config only: merge it into the model's own")
    if wide := [record for record in result.records if PER_TENSOR in record.note]:
        worst = min(record.weight_sqnr_db or float("inf") for record in wide)
        notes.append(
            f"{len(wide)} layers have a scale per output channel, the format has one per tensor: they were rounded a "
            f"second time, at {worst:.1f} dB at worst. Give the original weights (--original), which are rounded once"
        )
    merged = [record for record in result.records if MERGED in record.note]
    if merged:
        worst = min(record.weight_sqnr_db or float("inf") for record in merged)
        notes.append(
            f"{len(merged)} layers had two scales, the format has one: they were rounded a second time, at {worst:.1f} "
            "dB at worst, and are no better than the runtime's own rounding of the float model. Give the original "
            "weights (--original) or quantize with the preset w8a8-single"
        )
    return (*notes, *result.notes)
