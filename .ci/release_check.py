"""Whether the tree can be released: version, changelog, citation, pins and git agree. For ``make release-check``."""

import pathlib
import re
import subprocess
import sys
import tomllib
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parent.parent
PINS = {"requirements.txt": "dev", "docs/requirements.txt": "docs"}
"""Files of pins, each with the extra that it serves."""


def faults(root: pathlib.Path) -> list[str]:
    """What is not ready, each with what to do."""
    version = project(root)["version"]
    found = unpinned(root)
    if f'"{version}"' not in (root / "fxq" / "version.py").read_text():
        found.append(f"fxq/version.py does not say {version}, as pyproject.toml does: write it there")
    if f"\nversion: {version}\n" not in (root / "CITATION.cff").read_text():
        found.append(f"CITATION.cff does not say version {version}: write it there")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", (root / "CHANGELOG.md").read_text(), re.M):
        found.append(f"CHANGELOG.md has no heading '## [{version}] - YYYY-MM-DD': give what is unreleased that name")
    if git(root, "status", "--porcelain"):
        found.append("the working tree has changes: commit or remove them")
    if git(root, "tag", "--list", f"v{version}"):
        found.append(f"the tag v{version} exists: raise the version")
    return found


def project(root: pathlib.Path) -> dict[str, Any]:
    """The table ``project`` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return table


def unpinned(root: pathlib.Path) -> list[str]:
    """What pyproject.toml asks for and the files of pins do not give in exactly one version that it allows."""
    found, pins = [], dict[str, str]()
    asked = project(root)
    for file, extra in PINS.items():
        lines = (root / file).read_text().splitlines()
        given = [Requirement(line) for line in lines if line and not line.startswith("#")]
        for pin in given:
            exact = re.fullmatch(r"==([^*,]+)", str(pin.specifier))
            if exact is None:
                found.append(f"{file} does not pin {pin.name}: give one version, {pin.name}==...")
            else:
                pins[canonicalize_name(pin.name)] = exact[1]
        needed = asked["optional-dependencies"][extra] + (asked["dependencies"] if extra == "dev" else [])
        for wish in map(Requirement, needed):
            version = pins.get(canonicalize_name(wish.name))
            if version is None:
                found.append(f"{file} has no {wish.name}, which pyproject.toml asks for: pin it")
            elif not wish.specifier.contains(version, prereleases=True):
                found.append(f"{file} has {wish.name} {version}, pyproject.toml asks for {wish.specifier}")
    return found


def git(root: pathlib.Path, *arguments: str) -> str:
    """What git prints."""
    return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    for fault in (told := faults(ROOT)):
        print(fault)
    sys.exit(bool(told))
