"""Weights of a float model by the name of their repository: listed and judged first, then fetched into the cache."""

from __future__ import annotations

import fnmatch
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence

from fxq.export.hub.client import HubError, UnreachableError, is_repository, speaking
from fxq.export.hub.fetch import check_names, fetch_file
from fxq.runtime.reading import MAX_JSON_BYTES
from fxq.runtime.streams import warn

WEIGHTS = ".safetensors"
TEXT = (".json", ".txt", ".md")
"""Endings of what is fetched beside weights."""
BESIDE = ("config.json", "adapter_config.json")
"""Fetched with the weights beside which they lie."""
_FORM = re.compile(r"(?P<repository>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<pattern>.+))?")


def locate_weights(given: str | os.PathLike[str]) -> pathlib.Path:
    """The file or folder of weights that a user named; what lies in a repository is fetched unless the cache has it.

    Args:
        given: a path, or ``org/name``, ``org/name@revision``, ``org/name:PATTERN``. The pattern chooses files by their
            path in the repository, as ``transformer/*``; without one those at its top are meant. What is here, or
            would lie in a folder that is here, is a path.

    Raises:
        HubError: when the repository is not there, cannot be reached or holds what is not fetched.
    """
    path = pathlib.Path(given)
    found = _FORM.fullmatch(path.as_posix())
    if found is None or not is_repository(found["repository"]):
        return path
    if path.exists() or pathlib.Path(found["repository"]).parent.exists():
        return path
    try:
        return fetch_weights(found["repository"], found["revision"], found["pattern"])
    except HubError as error:
        raise type(error)(f"there is no {path} here, and {error}") from error


def fetch_weights(repository: str, revision: str | None = None, pattern: str | None = None) -> pathlib.Path:
    """Fetch weights of a float model into the hub's cache, after a look at the list of the repository's files.

    Where the hub does not answer what the cache holds is taken, with a warning; with ``HF_HUB_OFFLINE`` the hub is not
    asked.

    Returns:
        The file, or the folder where several belong together.

    Raises:
        HubError: naming the repository and the files; nothing was fetched when the list says so.
        UnreachableError: when the hub does not answer and the cache does not hold them.
    """
    with speaking(repository, revision) as hub:
        offline = hub.constants.is_offline_mode()
    if offline:
        return _cached(repository, revision, pattern)
    try:
        with speaking(repository, revision) as hub:
            info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
            sizes = {entry.rfilename: entry.size for entry in info.siblings or ()}
            room = shutil.disk_usage(_existing(pathlib.Path(hub.constants.HF_HUB_CACHE))).free
        names = choose(repository, sizes, pattern)
        check_sizes(repository, {name: sizes[name] for name in names}, room)
        for name in names:
            place = fetch_file(repository, name, revision, info.sha)
        return _together(place, names)
    except UnreachableError as error:
        try:
            found = _cached(repository, revision, pattern)
        except HubError:
            raise error from None
        warn(f"{error}; what the cache holds is used, {found}", stacklevel=3)
        return found


def choose(repository: str, names: Sequence[str] | Mapping[str, int | None], pattern: str | None) -> list[str]:
    """The files that a pattern means, and the settings beside them; weights come last.

    Raises:
        HubError: when there are no weights among them, or files that may hold code, or files of several folders.
    """
    check_names(repository, names)
    meant = [name for name in names if (fnmatch.fnmatchcase(name, pattern) if pattern else "/" not in name)]
    weights = [name for name in meant if name.lower().endswith(WEIGHTS)]
    if not weights:
        raise HubError(f"{repository} has no weights {_where(pattern)}: {_instead(names, meant)}")
    other = [name for name in meant if not name.lower().endswith((WEIGHTS, *TEXT))] if pattern else []
    if other:
        raise HubError(
            f"{repository}: the pattern {pattern!r} means files that may hold code ({', '.join(other[:3])}); only "
            f"{WEIGHTS}, {', '.join(TEXT)} are fetched: choose a narrower pattern"
        )
    folders = {_folder(name) for name in weights}
    if len(folders) > 1:
        raise HubError(
            f"{repository} has weights {_where(pattern)} in {len(folders)} folders ({', '.join(sorted(folders)[:3])}): "
            "choose one by a pattern, org/name:FOLDER/*"
        )
    (folder,) = folders
    text = [name for name in names if _folder(name) == folder and (name in meant or _beside(name))]
    return [*(name for name in text if name.lower().endswith(".json")), *weights]


def check_sizes(repository: str, sizes: Mapping[str, int | None], room: int) -> None:
    """Compare sizes with what is read and with the disk.

    Raises:
        HubError: for a size that is unknown, a JSON file that is too large, or more than ``room`` bytes.
    """
    for name, size in sizes.items():
        if size is None:
            raise HubError(f"{repository} does not say how large {name} is, and nothing is fetched from it")
        if not name.lower().endswith(WEIGHTS) and size > MAX_JSON_BYTES:
            raise HubError(f"{repository}: {name} has {size} bytes, at most {MAX_JSON_BYTES} are read")
    total = sum(size or 0 for size in sizes.values())
    if total > room:
        raise HubError(
            f"{repository}: {len(sizes)} files of {total / 1e9:.2f} GB do not fit on the disk of the hub's cache, "
            f"which has {room / 1e9:.2f} GB: free some, or set HF_HOME to another disk"
        )


def _where(pattern: str | None) -> str:
    return f"by the pattern {pattern!r}" if pattern else "at its top"


def _instead(names: Sequence[str] | Mapping[str, int | None], meant: Sequence[str]) -> str:
    found = [name for name in names if name.lower().endswith(WEIGHTS)]
    if found:
        return f"choose from {', '.join(found[:6])} by a pattern, org/name:PATTERN"
    pickled = [name for name in (*meant, *names) if name.lower().endswith((".pt", ".pth", ".ckpt", ".bin"))]
    if pickled:
        return (
            f"it has {pickled[0]}, a kind of file that may hold code, which is not fetched; if you trust it, `hf "
            "download` it and give the file, whose tensors alone are read"
        )
    return f"it has no {WEIGHTS} at all"


def _beside(name: str) -> bool:
    return pathlib.PurePosixPath(name).name in BESIDE or name.endswith(f"{WEIGHTS}.index.json")


def _folder(name: str) -> str:
    return str(pathlib.PurePosixPath(name).parent)


def _together(snapshot: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """The one file of weights, or the folder of several."""
    weights = [name for name in names if name.lower().endswith(WEIGHTS)]
    found = snapshot / weights[0]
    return found if len(weights) == 1 else found.parent


def _existing(folder: pathlib.Path) -> pathlib.Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _cached(repository: str, revision: str | None, pattern: str | None) -> pathlib.Path:
    """The same from the cache, without asking the hub."""
    with speaking(repository, revision) as hub:
        snapshot = pathlib.Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
    names = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
    return _together(snapshot, choose(repository, names, pattern))
