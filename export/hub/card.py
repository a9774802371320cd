"""Model cards: what a bundle or an export says of itself, as a page with the metadata that the hub reads."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from fxq.core.ir import LayerPlan
from fxq.export.bundle import MANIFEST, TENSORS, read_manifest
from fxq.export.files import BundleError
from fxq.export.hub.client import HubError, client, speaking
from fxq.export.hub.use import use_of
from fxq.export.interop import REPORT
from fxq.export.receipt import Receipt, read_receipt
from fxq.recipes import recipe_from_json, recipe_to_toml
from fxq.runtime.reading import read_bytes, read_json
from fxq.runtime.tables import named

COUNTS = ("layers_kept", "layers_quantized")
"""Metrics of a receipt that a card tells elsewhere."""
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
MAX_RESULTS_BYTES = 1 << 20
_FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#{1,4} )", re.MULTILINE)
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#!])")


@dataclasses.dataclass(frozen=True)
class License:
    """A licence as the hub names it: ``id`` such as ``apache-2.0``, or ``other`` with a name and a link."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What a card is to say beside what the folder says of itself.

    Attributes:
        repository: where it will lie, ``org/name``; the folder's path when unknown.
        base_model: the repository of the float model.
        license: of the weights; see :func:`license_of`.
        pipeline_tag: the task, as the hub names it.
        pictures: files to show at the top, pushed beside the card.
        results: a file of Markdown with measurements and the commands that made them.
    """

    repository: str | None = None
    base_model: str | None = None
    license: License | None = None
    pipeline_tag: str = "text-to-video"
    pictures: tuple[pathlib.Path, ...] = ()
    results: pathlib.Path | None = None


def license_of(base_model: str) -> License:
    """The licence that the card of a base model states.

    Raises:
        HubError: when the model is not there, the hub does not answer, or its card states none.
    """
    with speaking(base_model) as hub:
        data = hub.HfApi().model_info(base_model).card_data
    named = None if data is None else data.license
    if not isinstance(named, str) or not named:
        raise HubError(f"{base_model} states no licence on its card; find out which it has and say so: --license")
    return License(named, getattr(data, "license_name", None), getattr(data, "license_link", None))


def make_card(folder: str | os.PathLike[str], card: Card) -> str:
    """The text of a README.md for a bundle or an exported folder.

    Raises:
        BundleError: when the folder is neither, or a picture or the results cannot be read.
        HubError: when huggingface_hub is not installed.
    """
    place = pathlib.Path(folder)
    target, kept, counts = _layers(place)
    receipt = read_receipt(place)
    recipe = recipe_from_json(receipt.recipe)
    quantized = ", ".join(f"{count} as {label}" for label, count in counts.items())
    total = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    title = card.repository.split("/")[-1] if card.repository else place.absolute().name
    facts = {
        "recipe": recipe.name,
        "quantized linears": quantized or "none",
        "linears in floating point": str(sum(map(len, kept.values()))),
        "weights": f"{total / 1e6:,.1f} MB",
        "format": f"fxq bundle, see {MANIFEST}" if not target else f"{target}, see {REPORT}",
        "calibration data": receipt.calibration_hash[:16] or "none",
        "made with": ", ".join(
            f"{name} {receipt.environment[name]}" for name in ("torch", "python") if name in receipt.environment
        ),
    }
    return _template().render(
        metadata=_metadata(card, recipe.name, list(counts)),
        title=title,
        lead=f"Linears that compute on integers, by the recipe {recipe.name}: {quantized or 'none'}.",
        base=card.base_model,
        version=receipt.fxq_version,
        pictures=[{"name": path.name, "said": path.stem.replace("_", " ")} for path in _pictures(card.pictures)],
        facts=list(facts.items()),
        kept=[(reason, named(layers)) for reason, layers in kept.items()],
        metrics=_metrics(receipt),
        machine=receipt.environment.get("processor", "unknown processor"),
        results="" if card.results is None else _read(card.results),
        use=use_of(target, card.repository or str(place), _weights(place)),
        recipe=recipe_to_toml(recipe).strip(),
        fence="```",
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fxq.export.hub", "templates"),
        autoescape=False,  # Markdown: everything foreign goes through ``words``
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["words"] = plain_words
    return environment.get_template("card.md.j2")


def plain_words(text: object) -> str:
    """A text from a file as one line of Markdown that shows its characters and is no markup."""
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split()))


def _metadata(card: Card, recipe: str, bits: Sequence[str]) -> str:
    given = card.license
    tags = ["fxq", "quantized", *dict.fromkeys(label.split()[0].lower() for label in bits), "safetensors"]
    more = {"base_model_relation": "quantized"} if card.base_model else {}
    data = client().ModelCardData(
        base_model=card.base_model,
        library_name="fxq",
        license=None if given is None else given.id,
        license_name=None if given is None else given.name,
        license_link=None if given is None else given.link,
        pipeline_tag=card.pipeline_tag,
        tags=tags,
        **more,
    )
    return str(data.to_yaml())


def _layers(place: pathlib.Path) -> tuple[str, dict[str, list[str]], dict[str, int]]:
    """Target ("" for a bundle), layers in floating point by reason, and number of the others by their bits."""
    kept: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    if (place / MANIFEST).is_file():
        for layer, entry in read_manifest(place).layers.items():
            plan = LayerPlan.from_json(entry.plan)
            if plan.scheme is None:
                kept.setdefault(plan.reason, []).append(layer)
            else:
                counts[plan.scheme.detail] = counts.get(plan.scheme.detail, 0) + 1
        return "", kept, counts
    report = _report(place)
    for record in report["layers"]:
        if record["form"] == "float":
            kept.setdefault(record["note"] or "in floating point", []).append(record["name"])
        else:
            counts[record["form"]] = counts.get(record["form"], 0) + 1
    return str(report["target"]), kept, counts


def _report(place: pathlib.Path) -> Mapping[str, Any]:
    try:
        report = read_json(place / REPORT, place)
        if not isinstance(report, dict) or not {"target", "layers"} <= {*report}:
            raise ValueError("it says no target and layers")
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{place} is neither a bundle of fxq ({MANIFEST}) nor an export ({REPORT}): {error}"
        ) from error
    return report


def _weights(place: pathlib.Path) -> str:
    return min((file.name for file in place.glob("*.safetensors")), default=TENSORS)


def _metrics(receipt: Receipt) -> list[tuple[str, str]]:
    words = {"sqnr": "SQNR", "psnr": "PSNR", "db": "dB"}
    return [
        (" ".join(words.get(word, word) for word in name.split("_")), str(value))
        for name, value in sorted(receipt.metrics.items())
        if name not in COUNTS
    ]


def _pictures(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    found = list(paths)
    for path in found:
        if path.suffix.lower() not in PICTURES:
            raise BundleError(f"{path} is no picture: expected a file that ends in {', '.join(PICTURES)}")
        if not path.is_file():
            raise BundleError(f"{path}: there is no such picture")
    if len({path.name for path in found}) < len(found):
        raise BundleError("two pictures have the same name; they lie side by side on the hub")
    return found


def _read(path: pathlib.Path) -> str:
    try:
        return _below(read_bytes(path, limit=MAX_RESULTS_BYTES).decode("utf-8").strip())
    except (OSError, ValueError) as error:
        raise BundleError(f"results {path} cannot be read: {error}") from error


def _below(text: str, level: int = 2) -> str:
    """Markdown with its headings below one of a level; code is left alone."""
    parts = _FENCED.split(text)
    return "".join(part if part.startswith("```") else _HEADING.sub("#" * level + r"\1", part) for part in parts)
