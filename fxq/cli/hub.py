"""Commands for the hub of Hugging Face."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import typer

from fxq.cli.options.common import JsonOption, emit_json, expanding
from fxq.export.hub.card import Card, License, license_of, make_card
from fxq.export.hub.push import push as push_folder
from fxq.runtime.streams import emit, stdout_console
from fxq.runtime.writable import whole_file, writable_file

FolderArgument = Annotated[pathlib.Path, typer.Argument(help="Folder made by `fxq quantize` or `fxq export`.")]


def card_options(
    base_model: Annotated[
        str | None, typer.Option(help="Repository of the float model, org/name; its licence is taken.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the weights as the hub names it, such as apache-2.0.")
    ] = None,
    pipeline_tag: Annotated[str, typer.Option(help="The task, as the hub names it.")] = "text-to-video",
    picture: Annotated[list[pathlib.Path] | None, typer.Option(help="Picture to show at the top; may repeat.")] = None,
    results: Annotated[pathlib.Path | None, typer.Option(help="Markdown with measurements and their commands.")] = None,
) -> Card:
    """The options of a model card."""
    known = License(license) if license else license_of(base_model) if base_model else None
    return Card(
        base_model=base_model,
        license=known,
        pipeline_tag=pipeline_tag,
        pictures=tuple(picture or ()),
        results=results,
    )


with_card = expanding("about", card_options)


@with_card
def card(
    folder: FolderArgument,
    about: Card,
    repository: Annotated[str | None, typer.Option(help="Where it will lie, org/name.")] = None,
    out: Annotated[pathlib.Path | None, typer.Option(help="File to write; standard output when absent.")] = None,
) -> None:
    """Write the model card of a bundle or an exported folder, as Markdown with the hub's metadata."""
    text = make_card(folder, dataclasses.replace(about, repository=repository))
    if out is None:
        emit(text.rstrip("\n"))
        return
    with whole_file(writable_file(out)) as part:
        part.write_text(text, encoding="utf-8")


@with_card
def push(
    folder: FolderArgument,
    repository: Annotated[str, typer.Argument(help="Where it goes, org/name; made where it is missing.")],
    about: Card,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a bundle or an exported folder to the hub of Hugging Face, with a model card."""
    address = push_folder(
        folder, dataclasses.replace(about, repository=repository), private=private, branch=branch, message=message
    )
    if as_json:
        emit_json({"repository": repository, "commit": address})
    else:
        stdout_console().print(address, markup=False, highlight=False, soft_wrap=True)
