"""Whether the tree can be released: version, changelog, citation and git agree. For ``make release-check``."""

import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent


def faults(root: pathlib.Path) -> list[str]:
    """What is not ready, each with what to do."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    found = []
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


def git(root: pathlib.Path, *arguments: str) -> str:
    """What git prints."""
    return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    for fault in (told := faults(ROOT)):
        print(fault)
    sys.exit(bool(told))
