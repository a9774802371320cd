"""A bundle by the name of its repository: listed and judged first, then fetched into the hub's cache."""

from __future__ import annotations

import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from fxq.dtypes import DTYPES
from fxq.export import bundle
from fxq.export.bundle import GRAPH, MANIFEST, TENSORS, read_manifest
from fxq.export.files import BundleError
from fxq.export.hub.client import HubError, UnreachableError, is_repository, speaking
from fxq.runtime.reading import MAX_JSON_BYTES, MAX_NAME
from fxq.runtime.streams import warn

FILES = (MANIFEST, GRAPH, TENSORS)
"""What is fetched, in this order."""
HARMLESS = (".safetensors", ".json", ".md", ".txt", ".toml", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4")
"""Endings of files that may lie beside them."""
HARMLESS_NAMES = (".gitattributes", "LICENSE", "NOTICE")
MAX_FILES = 1000
HEADER_BYTES = MAX_JSON_BYTES
"""Most bytes of the header of a tensor file."""


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    operators: Iterable[str] = (),
) -> fx.GraphModule:
    """Load a bundle, from a folder or from the hub, into a runnable GraphModule.

    Nothing is unpickled and no code from the bundle runs. The nodes get their example values back where the bundle
    states its inputs, so that :func:`fxq.optimize` can work on the result.

    Args:
        path: folder written by :func:`save`, or ``"org/name"`` of a repository (see :func:`locate`).
        device: where tensors go.
        revision: branch, tag or commit of a repository; ``main`` by default.
        operators: those of other libraries that the bundle may call, ``"library.name"`` each; import the library first.

    Raises:
        HubError: when a repository is not there, cannot be reached or holds what is not fetched.
        BundleError: when a file is missing, truncated, altered, of an unknown version or inconsistent, or when it calls
            an operator of another library that is not among ``operators``.
    """
    return bundle.load(locate(path, revision), device, operators=operators)


def locate(path: str | os.PathLike[str], revision: str | None = None) -> pathlib.Path:
    """The folder of a bundle; that of ``"org/name"`` is fetched unless the cache has it.

    A path object, and a text that names something here or in a folder that is here, is a path and no repository.

    Raises:
        HubError: when a repository is not there, cannot be reached or holds what is not fetched.
        BundleError: when a revision of a folder is asked for.
    """
    folder = pathlib.Path(path)
    local = not isinstance(path, str) or not is_repository(path) or os.path.lexists(folder.parent)
    if not local:
        try:
            return fetch_bundle(str(path), revision)
        except HubError as error:
            raise type(error)(f"there is no folder {path} here, and {error}") from error
    if revision is not None:
        raise BundleError(
            f"{folder}: a folder has no revision {revision!r}; revisions are those of a repository, org/name"
        )
    return folder


def fetch_bundle(repository: str, revision: str | None = None) -> pathlib.Path:
    """Fetch a bundle into the hub's cache, after a look at the list of its files and at its manifest.

    Where the hub does not answer the revision that the cache holds is taken, with a warning; with ``HF_HUB_OFFLINE``
    the hub is not asked.

    Raises:
        HubError: naming the repository and the file; nothing was fetched when the list says so.
        UnreachableError: when the hub does not answer and the cache does not hold the bundle.
    """
    with speaking(repository, revision) as hub:
        offline = hub.constants.is_offline_mode()
    if offline:
        return _cached(repository, revision)
    try:
        with speaking(repository, revision) as hub:
            info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
            sizes = {entry.rfilename: entry.size for entry in info.siblings or ()}
        check_listing(repository, sizes)
        _check_tensors(repository, info.sha, sizes[TENSORS])
        for name in FILES:
            folder = fetch_file(repository, name, revision, info.sha)
        return folder
    except UnreachableError as error:
        try:
            folder = _cached(repository, revision)
        except HubError:
            raise error from None
        warn(f"{error}; the cached revision {folder.name} is used", stacklevel=3)
        return folder


def check_names(repository: str, names: Iterable[str]) -> None:
    """Compare the names of a repository's files with what a folder can hold.

    Raises:
        HubError: when one leads elsewhere.
    """
    for name in names:
        parts = pathlib.PurePosixPath(name).parts
        if len(name) > MAX_NAME or "\\" in name or "\0" in name or name.startswith("/") or {".", ".."} & {*parts}:
            raise HubError(f"{repository} lists a file {name[:100]!r}, which leads out of its folder")


def check_listing(repository: str, sizes: Mapping[str, int | None]) -> None:
    """Judge the names and sizes of a repository's files.

    Raises:
        HubError: when a file of the bundle is missing, too large or of unknown size, a name leads elsewhere, or there
            are files that are no weights, text or pictures.
    """
    if len(sizes) > MAX_FILES:
        raise HubError(f"{repository} has {len(sizes)} files; a bundle's repository has at most {MAX_FILES}")
    check_names(repository, sizes)
    if missing := [name for name in FILES if name not in sizes]:
        raise HubError(f"{repository} is no bundle of fxq: it has no {', '.join(missing)}")
    other = [
        name
        for name in sizes
        if not name.lower().endswith(HARMLESS) and pathlib.PurePosixPath(name).name not in HARMLESS_NAMES
    ]
    if other:
        raise HubError(
            f"{repository} has files that may hold code ({', '.join(sorted(other)[:3])}): nothing is fetched from it; "
            f"if you trust it, fetch {', '.join(FILES)} yourself and give the folder"
        )
    for name in FILES:
        size = sizes[name]
        if size is None:
            raise HubError(f"{repository} does not say how large {name} is, and nothing is fetched from it")
        if name != TENSORS and size > MAX_JSON_BYTES:
            raise HubError(f"{repository}: {name} has {size} bytes, at most {MAX_JSON_BYTES} are read")


def _check_tensors(repository: str, commit: str, size: int | None) -> None:
    """Compare the size of the tensor file with what the manifest says lies in it, before the cache gets either."""
    with tempfile.TemporaryDirectory() as aside, speaking(repository) as hub:
        cached = hub.try_to_load_from_cache(repository, MANIFEST, revision=commit)
        if not isinstance(cached, str):
            cached = hub.hf_hub_download(repository, MANIFEST, revision=commit, local_dir=aside)
        manifest = read_manifest(pathlib.Path(cached).parent)
    stated = sum(math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in manifest.tensors.values())
    if size is None or not stated <= size <= stated + 8 + HEADER_BYTES:
        raise HubError(
            f"{repository}: {TENSORS} has {size} bytes, its manifest states tensors of {stated}; it is not fetched"
        )


def fetch_file(repository: str, name: str, revision: str | None, commit: str) -> pathlib.Path:
    """The folder of a revision in the cache with one file more; asked for by its name, so that the cache knows that."""
    with speaking(repository, revision) as hub:
        file = pathlib.Path(hub.hf_hub_download(repository, name, revision=revision))
    folder = file.parents[name.count("/")]
    if folder.name != commit:
        raise HubError(
            f"{repository} changed while it was fetched, from {commit[:12]} to {folder.name[:12]}; try again"
        )
    return folder


def _cached(repository: str, revision: str | None) -> pathlib.Path:
    """The folder of a bundle in the cache, without asking the hub."""
    with speaking(repository, revision) as hub:
        found = [hub.hf_hub_download(repository, name, revision=revision, local_files_only=True) for name in FILES]
    return pathlib.Path(found[0]).parent
