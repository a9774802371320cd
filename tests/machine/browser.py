"""Chromium for the tests of ``fxq play``: what the machine has, or a headless build from npm below ``.venv/browser``.

``python tests/machine/browser.py`` fetches it where there is none. It asks for no rights of root and, where it cannot,
says so in one line and succeeds: the tests are then skipped.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request

PACKAGE, VERSION = "@sparticuz/chromium", "153.0.0"
SHA512 = (
    "8e2196a92bcf31dbb8f8ff538a562a011ef21063c41c8371fa50af13f36a34ef"
    "c41d8cc5ff1d615222394fa8a8548b7b744cbb9fcf1bcb24f4be4f9d9ec810c0"
)
HERE = pathlib.Path(sys.prefix) / "browser"
LIBRARIES = "al2023"
ARCHIVES = {LIBRARIES: "", "fonts": "", "swiftshader": "bin"}
"""Archives of the package beside the program itself, each with the folder that it is unpacked into."""
FONTS = f"""<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{HERE}/fonts</dir><cachedir>{HERE}/cache</cachedir></fontconfig>
"""
# The libraries it brings go before the machine's, which may have none of them.
START = """#!/bin/sh
here=${0%/*}
LD_LIBRARY_PATH="$here/lib" FONTCONFIG_PATH="$here" exec "$here/bin/chromium" "$@"
"""


def found() -> str | None:
    """The Chromium that tests start: ``FXQ_CHROMIUM``, the machine's, or the fetched one."""
    own = HERE / "chromium"
    return os.environ.get("FXQ_CHROMIUM") or installed() or (str(own) if own.is_file() else None)


def installed() -> str | None:
    """A Chromium or Chrome on PATH."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def why_not() -> str:
    """Why no page can be opened here, or ""."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    return "" if found() else "no Chromium: make browser fetches one, FXQ_CHROMIUM names another"


def fetch() -> str:
    """Put the pinned build below ``HERE``, unless there is a Chromium; what came of it, in a line."""
    if there := found():
        return f"browser: {there}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"no browser: {PACKAGE} is for Linux on x86-64, install Chromium"
    try:
        with tempfile.TemporaryDirectory(dir=HERE.parent) as folder:
            packed = download(pathlib.Path(folder))
            if (digest := hashlib.sha512(packed).hexdigest()) != SHA512:
                return f"no browser: {PACKAGE} {VERSION} has the hash {digest[:12]}..., {SHA512[:12]}... is expected"
            unpack(packed, pathlib.Path(folder) / "new")
            shutil.rmtree(HERE, ignore_errors=True)
            (pathlib.Path(folder) / "new").rename(HERE)
    except Exception as error:  # the network, the disk, npm, a missing brotli: the build goes on without
        told = str(error).strip().splitlines()
        return f"no browser: {PACKAGE} {VERSION} could not be fetched: {told[-1] if told else type(error).__name__}"
    return f"browser: {HERE / 'chromium'}"


def download(folder: pathlib.Path) -> bytes:
    """The package as the registry has it: by npm, or without it from the registry itself."""
    if npm := shutil.which("npm"):
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--fetch-retries=0", "--fetch-timeout=60000"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
        if not done.returncode:
            return next(folder.glob("*.tgz")).read_bytes()
    address = f"https://registry.npmjs.org/{PACKAGE}/-/{PACKAGE.partition('/')[2]}-{VERSION}.tgz"
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.read()


def unpack(packed: bytes, folder: pathlib.Path) -> None:
    """Program, libraries and fonts, and what starts it with them."""
    import brotli

    with tarfile.open(fileobj=io.BytesIO(packed)) as package:

        def content(name: str) -> bytes:
            member = package.extractfile(f"package/bin/{name}.br")
            assert member is not None
            return brotli.decompress(member.read())

        write(folder / "bin" / "chromium", content("chromium"))
        for name, below in ARCHIVES.items():
            with tarfile.open(fileobj=io.BytesIO(content(f"{name}.tar"))) as archive:
                for member in filter(tarfile.TarInfo.isfile, archive):
                    inside = archive.extractfile(member)
                    assert inside is not None
                    write(folder / below / member.name, inside.read())
    (folder / "fonts.conf").write_text(FONTS)
    write(folder / "chromium", START.encode())


def write(path: pathlib.Path, content: bytes) -> None:
    """A file that may be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o755)


if __name__ == "__main__":
    print(fetch())
