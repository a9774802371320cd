"""What ``make browser`` fetches, on a package of this shape that a test makes itself."""

import hashlib
import io
import subprocess
import tarfile

import brotli
import pytest

from tests.machine import browser

PROGRAM = b'#!/bin/sh\necho "$LD_LIBRARY_PATH $FONTCONFIG_PATH $1"\n'


def packed(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with the pinned hash, on a machine that has no browser and where nothing is fetched."""
    inner = {name: brotli.compress(tarred(f"{name}/file")) for name in browser.ARCHIVES}
    files = {f"package/bin/{name}.tar.br": data for name, data in inner.items()}
    made = packed(files | {"package/bin/chromium.br": brotli.compress(PROGRAM)})
    monkeypatch.setattr(browser, "HERE", tmp_path / "browser")
    monkeypatch.setattr(browser, "SHA512", hashlib.sha512(made).hexdigest())
    monkeypatch.setattr(browser, "installed", lambda: None)
    monkeypatch.setattr(browser, "download", lambda folder: made)
    monkeypatch.setattr(browser.sys, "platform", "linux")
    monkeypatch.setattr(browser.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("FXQ_CHROMIUM", raising=False)
    return made


def tarred(name):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return content.getvalue()


def test_what_is_fetched_starts_with_its_own_libraries_and_fonts(package):
    assert "make browser" in browser.why_not()
    assert browser.fetch() == f"browser: {browser.HERE}/chromium"
    assert browser.found() == f"{browser.HERE}/chromium" and not browser.why_not()
    said = subprocess.run([browser.found(), "page"], capture_output=True, text=True, check=True).stdout
    assert said == f"{browser.HERE}/lib {browser.HERE} page\n"
    assert (browser.HERE / "bin/swiftshader/file").is_file() and (browser.HERE / "al2023/file").is_file()


def test_another_package_than_the_pinned_one_is_not_unpacked(package, monkeypatch):
    monkeypatch.setattr(browser, "download", lambda folder: package + b"more")
    assert "is expected" in browser.fetch()
    assert not browser.HERE.exists() and "make browser" in browser.why_not()


def test_a_registry_out_of_reach_fails_nothing(package, monkeypatch):
    def download(folder):
        raise OSError("first line\nno route to the registry")

    monkeypatch.setattr(browser, "download", download)
    assert browser.fetch().startswith("no browser: ") and browser.fetch().endswith("fetched: no route to the registry")
    assert list(browser.HERE.parent.iterdir()) == []


def test_nothing_is_fetched_where_there_is_a_browser(package, monkeypatch):
    monkeypatch.setattr(browser, "installed", lambda: "/usr/bin/chromium")
    assert browser.fetch() == "browser: /usr/bin/chromium" and not browser.HERE.exists()
    monkeypatch.setenv("FXQ_CHROMIUM", "/opt/chromium")
    assert browser.found() == "/opt/chromium"


def test_other_processors_are_told(package, monkeypatch):
    monkeypatch.setattr(browser.platform, "machine", lambda: "aarch64")
    assert browser.fetch().startswith("no browser: ") and not browser.HERE.exists()
