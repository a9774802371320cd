"""Attack 7: a library planted where the compiled kernels are looked for, and compilers that do not behave."""

import os
import stat
import subprocess
import sys

import pytest

from fxq.kernels.native import build, cache

ROOT = os.geteuid() == 0
STRANGER = 54321

needs_root = pytest.mark.skipif(not ROOT, reason="only root can give a file to another user")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of this user's own as the cache."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("FXQ_CACHE_DIR", str(folder))
    return folder


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def compiler(tmp_path):
    """A compiler that writes a text, and counts how often."""
    ran = tmp_path / "ran"
    body = f'[ "$1" = --version ] && exit 0; echo x >> {ran}\nwhile [ "$1" != -o ]; do shift; done; echo lib > "$2"'
    return script(tmp_path / "cxx", body), lambda: len(ran.read_text().split()) if ran.exists() else 0


def test_a_library_is_compiled_once_into_a_folder_of_ones_own(own, compiler):
    cxx, ran = compiler
    assert cache.cache_folder() == own
    first = build.build(cxx, own, build.AVX2)
    assert build.build(cxx, own, build.AVX2) == first and ran() == 1
    assert stat.S_IMODE(first.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o775, 0o707])
def test_a_folder_that_others_can_write_into_is_not_used(own, compiler, mode):
    (own / "native-planted.so").write_text("evil")
    os.chown(own, os.geteuid(), STRANGER if ROOT else os.getegid())
    own.chmod(mode)
    if mode == 0o775 and not ROOT:
        own.chmod(0o777)
    with pytest.warns(UserWarning, match=r"is not used for compiled kernels: other users can write into"):
        used = cache.cache_folder()
    assert used != own and not cache.why_shared(used)
    assert stat.S_IMODE(used.stat().st_mode) == 0o700
    with pytest.raises(RuntimeError, match="set FXQ_CACHE_DIR to a folder of your own"):
        build.build(compiler[0], own, build.AVX2)


def test_a_library_that_others_could_have_written_is_compiled_again(own, compiler):
    cxx, ran = compiler
    library = build.build(cxx, own, build.AVX2)
    library.write_text("evil")
    library.chmod(0o666)
    assert build.build(cxx, own, build.AVX2) == library
    assert ran() == 2 and library.read_text() == "lib\n"


def test_a_link_in_the_place_of_a_library_is_not_followed(own, compiler, tmp_path):
    cxx, _ = compiler
    library = build.build(cxx, own, build.AVX2)
    (tmp_path / "evil.so").write_text("evil")
    library.unlink()
    library.symlink_to(tmp_path / "evil.so")
    assert build.build(cxx, own, build.AVX2) == library
    assert not library.is_symlink() and library.read_text() == "lib\n"
    assert (tmp_path / "evil.so").read_text() == "evil"


@needs_root
def test_a_library_of_another_user_is_compiled_again(own, compiler):
    cxx, ran = compiler
    library = build.build(cxx, own, build.AVX2)
    os.chown(library, STRANGER, STRANGER)
    build.build(cxx, own, build.AVX2)
    assert ran() == 2 and library.stat().st_uid == 0


@needs_root
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_of_another_user_is_not_used_through_a_link_either(tmp_path, monkeypatch, linked):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, STRANGER, STRANGER)
    path = theirs
    if linked:
        path = tmp_path / "fxq"
        path.symlink_to(theirs)
    monkeypatch.setenv("FXQ_CACHE_DIR", str(path))
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert cache.cache_folder() not in (path, theirs)


@needs_root
def test_a_folder_below_one_of_another_user_is_not_used(tmp_path):
    below = tmp_path / "theirs" / "mine"
    below.mkdir(parents=True, mode=0o700)
    os.chown(tmp_path / "theirs", STRANGER, STRANGER)
    assert "theirs belongs to another user" in cache.why_shared(below)


def test_a_folder_that_cannot_be_made_gives_way_to_a_private_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXQ_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert stat.S_IMODE(cache.cache_folder().stat().st_mode) == 0o700


def test_a_compiler_that_hangs_is_given_up(own, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "VERSION_SECONDS", 1)
    with pytest.raises(RuntimeError, match="does not end within 1 seconds; set CXX to another compiler"):
        build.build(script(tmp_path / "slow", "exec sleep 60"), own, build.AVX2)


@pytest.mark.parametrize("options", ["-O2", "-O2 -g", "'-DX=a b'"])
def test_a_compiler_with_options_is_a_compiler(monkeypatch, compiler, tmp_path, options):
    monkeypatch.setenv("CXX", f"{compiler[0]} {options}")
    seen = tmp_path / "seen"
    script(tmp_path / "cxx", f'for a in "$@"; do echo "$a" >> {seen}; done')
    assert build.compiler() is not None
    build._run([*build.shlex.split(build.compiler()), "--version"], 10)
    assert seen.read_text().split("\n")[:-2] == build.shlex.split(options)


@pytest.mark.parametrize("value", ["/no/such/compiler", "'unbalanced", "/no/such -O2"])
def test_a_compiler_that_is_not_there_is_none(monkeypatch, value):
    monkeypatch.setenv("CXX", value)
    assert build.compiler() is None


def test_a_planted_library_does_not_run(tmp_path):
    """The attack itself: a shared sticky folder, in which somebody has put a library of the right name."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    program = (
        "import pathlib, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "from fxq.kernels.native import build\n"
        "build.missing = lambda: ''\n"
        "build.build = lambda cxx, folder, target: print(folder) or (_ for _ in ()).throw(OSError('end'))\n"
        "build.library()\n"
    )
    environment = {**os.environ, "FXQ_CACHE_DIR": str(shared)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and str(shared) not in done.stdout
