"""The quantization receipt: what was done to a model, in the header of every tensor file that fxq writes."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from fxq.core.facts import Facts
from fxq.core.ir import LayerPlan
from fxq.export.files import BundleError
from fxq.export.graph.strict import Name, SchemaError, Text, validated
from fxq.runtime.reading import ReadError, parse_json, read_header

HEADER_KEY = "fxq_receipt"
RECEIPT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """How a model was quantized.

    ``recipe`` as in the manifest, ``calibration_hash`` of the data, ``metrics`` by name (counts of layers, output SQNR
    of the layers in dB, and what the caller of :func:`fxq.save` measured), ``environment`` versions and machine.
    ``source`` is, in an export for another runtime, the sha256 of the bundle's tensors; else empty.
    """

    receipt_version: int
    fxq_version: Text
    recipe: dict[str, Any]
    calibration_hash: Text
    metrics: dict[str, object]
    environment: dict[Name, Text]
    source: Text = ""

    def to_header(self) -> dict[str, str]:
        """The metadata entry of a safetensors file."""
        return {HEADER_KEY: json.dumps(dataclasses.asdict(self), separators=(",", ":"), sort_keys=True)}


def make_receipt(fxq_version: str, facts: Facts, plans: Iterable[LayerPlan], metrics: Mapping[str, object]) -> Receipt:
    """The receipt of a quantized module.

    Args:
        fxq_version: of the writer.
        facts: of the module.
        plans: of its linears.
        metrics: measured by the caller, JSON values by name; they take precedence over the layers' own.

    Raises:
        BundleError: when a metric has no JSON form.
    """
    known = list(plans)
    quality = sorted(p.output_sqnr for p in known if p.scheme is not None and p.output_sqnr is not None)
    own: dict[str, Any] = {
        "layers_quantized": sum(p.scheme is not None for p in known),
        "layers_kept": sum(p.scheme is None for p in known),
    }
    if quality:
        own |= {"output_sqnr_db_lowest": quality[0], "output_sqnr_db_median": quality[len(quality) // 2]}
    try:
        given = json.loads(json.dumps(dict(metrics), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BundleError(f"metrics must be JSON values by name, finite numbers included: {error}") from None
    return Receipt(
        receipt_version=RECEIPT_VERSION,
        fxq_version=fxq_version,
        recipe=dict(facts.recipe),
        calibration_hash=facts.calibration_hash,
        metrics=own | given,
        environment=dict(facts.environment),
    )


def read_receipt(path: str | os.PathLike[str]) -> Receipt:
    """Read the receipt of a bundle, of an export or of one tensor file; no tensor is loaded.

    Args:
        path: a safetensors file, or a folder that holds one (of several files, the first that has a receipt counts).

    Raises:
        BundleError: when there is no such file, it cannot be read, or it carries no receipt that this version knows.
    """
    place = pathlib.Path(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files:
        raise BundleError(f"{place} holds no safetensors file; give a bundle, an export or a tensor file")
    text = next((text for file in files if (text := _header(file).get(HEADER_KEY)) is not None), None)
    if text is None:
        raise BundleError(f"{files[0]} carries no receipt: it was not written by fxq, or by a version before receipts")
    try:
        data = parse_json(text)
        version = data.get("receipt_version") if isinstance(data, dict) else None
        if type(version) is not int or version != RECEIPT_VERSION:
            raise BundleError(f"{files[0]}: receipt version {repr(version)[:40]}, this fxq reads {RECEIPT_VERSION}")
        return validated(Receipt, data)
    except (ReadError, SchemaError) as error:
        raise BundleError(f"{files[0]}: the receipt is damaged: {error}") from error


def _header(file: pathlib.Path) -> dict[str, str]:
    try:
        return read_header(file, file.parent).metadata
    except (OSError, ReadError) as error:
        raise BundleError(f"{file} cannot be read: {error}") from error
