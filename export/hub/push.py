"""A bundle or an export brought to the hub, with its card, in one commit."""

from __future__ import annotations

import os
import pathlib

from fxq.export.bundle import MANIFEST, check_files, read_manifest
from fxq.export.hub.card import Card, make_card
from fxq.export.hub.client import HubError, is_repository, speaking
from fxq.export.hub.fetch import HARMLESS, HARMLESS_NAMES

README = "README.md"


def push(
    folder: str | os.PathLike[str],
    card: Card,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a bundle or an exported folder with its model card; the repository is made where it is missing.

    Args:
        folder: written by :func:`fxq.save` or ``fxq export``; a bundle's hashes are checked first.
        card: what its card says; ``card.repository`` is where it goes.
        private: make a new repository private.
        branch: to commit to, ``main`` by default.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        BundleError: when the folder is no bundle and no export, or is damaged; nothing was sent.
        HubError: when the name is no repository, the folder holds other files, or the hub refuses.
    """
    place, repository = pathlib.Path(folder), card.repository or ""
    if not is_repository(repository):
        raise HubError(f"{repository!r} is no repository: expected org/name, of letters, digits, '.', '-' and '_'")
    if (place / MANIFEST).is_file():
        check_files(place, read_manifest(place))
    text = make_card(place, card)
    files = {name: path for name, path in _files(place).items() if name != README}
    files |= {picture.name: picture for picture in card.pictures}
    with speaking(repository, branch) as hub:
        api = hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        operations = [hub.CommitOperationAdd(README, text.encode("utf-8"))]
        operations += [hub.CommitOperationAdd(name, str(path)) for name, path in files.items()]
        said = message or f"{place.absolute().name}, by fxq"
        return str(api.create_commit(repository, operations, commit_message=said, revision=branch).commit_url)


def _files(place: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of a folder by their name in the repository.

    Raises:
        HubError: when one is a link, or may hold code: what is fetched refuses it.
    """
    files, other = {}, []
    for path in sorted(place.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(place).as_posix()
        harmless = path.name.lower().endswith(HARMLESS) or path.name in HARMLESS_NAMES
        if path.is_symlink() or not path.is_file() or not harmless:
            other.append(name)
        files[name] = path
    if other:
        raise HubError(f"{place} holds what is not pushed: {', '.join(other[:3])}; weights, text and pictures are")
    return files
