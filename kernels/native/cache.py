"""Where compiled libraries and times lie: a folder that nobody else can write into, files that nobody else wrote."""

from __future__ import annotations

import functools
import os
import pathlib
import stat
import tempfile
import warnings


def chosen_folder() -> pathlib.Path:
    """``$FXQ_CACHE_DIR``, else ``fxq`` in the user's cache folder, or a temporary one where there is no home folder."""
    return _users_folder() or _temporary()


def _users_folder() -> pathlib.Path | None:
    if chosen := os.environ.get("FXQ_CACHE_DIR"):
        return pathlib.Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "fxq"
    except RuntimeError:
        return None


def lasting_folder() -> tuple[pathlib.Path | None, str]:
    """The folder that later processes find too, made where it was not; or None, and why there is none."""
    folder = _users_folder()
    if folder is None:
        return None, "there is no home folder; set FXQ_CACHE_DIR to a folder of your own"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        return None, f"{folder} cannot be made ({error.strerror or error}); set FXQ_CACHE_DIR to a folder of your own"
    if hasattr(os, "geteuid") and (reason := why_shared(folder)):
        return None, f"{reason}; set FXQ_CACHE_DIR to a folder of your own"
    if not os.access(folder, os.W_OK):
        return None, f"{folder} cannot be written into; set FXQ_CACHE_DIR to a folder of your own"
    return folder, ""


def cache_folder() -> pathlib.Path:
    """:func:`chosen_folder` where it is this user's alone; else a temporary folder for this process."""
    folder = chosen_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return _temporary()
    if reason := why_shared(folder):
        warnings.warn(
            f"{folder} is not used for compiled kernels: {reason}. This process compiles them for itself; set "
            "FXQ_CACHE_DIR to a folder of your own",
            stacklevel=2,
        )
    elif os.access(folder, os.W_OK):
        return folder
    return _temporary()


@functools.cache
def _temporary() -> pathlib.Path:
    """A folder of mode 700 with a name that nobody could know before."""
    return pathlib.Path(tempfile.mkdtemp(prefix="fxq-"))


def why_shared(path: pathlib.Path) -> str:
    """Why somebody else could have put something at ``path``, or into it; "" where nobody but this user and root can.

    The path itself, where links lead, and every folder on the way belong to this user or root, and others cannot write
    into them: a folder of others can be exchanged, and so can a link in one. A sticky folder such as ``/tmp`` is no
    place of one's own, but what this user owns in it stays.
    """
    real = pathlib.Path(os.path.realpath(path))
    for place in (pathlib.Path(os.path.abspath(path)), real):
        for part in (place, *place.parents):
            try:
                facts = part.lstat()
            except FileNotFoundError:
                continue
            if facts.st_uid not in (os.geteuid(), 0):
                return f"{part} belongs to another user"
            if stat.S_ISLNK(facts.st_mode):
                continue
            sticky_parent = part not in (place, real) and facts.st_mode & stat.S_ISVTX
            if _others_write(facts) and not sticky_parent:
                return f"other users can write into {part}"
    if real.exists() and real.stat().st_uid != os.geteuid():
        return f"{real} belongs to another user"
    return ""


def _others_write(facts: os.stat_result) -> bool:
    """Whether anybody else may write; a group of the user's own, without other members, is nobody else."""
    import grp  # there is none on Windows, where nothing is compiled
    import pwd

    if facts.st_mode & stat.S_IWOTH:
        return True
    if not facts.st_mode & stat.S_IWGRP:
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(facts.st_gid)
    except KeyError:
        return True
    private = user.pw_gid == facts.st_gid and user.pw_name == group.gr_name
    return not private or bool(set(group.gr_mem) - {user.pw_name})


def is_own_file(path: pathlib.Path) -> bool:
    """Whether a regular file is there that this user wrote and nobody else could have written."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    own = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not _others_write(facts)
    return own and not why_shared(path.parent)
