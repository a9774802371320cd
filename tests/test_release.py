import importlib.util
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SPEC = importlib.util.spec_from_file_location("release_check", ROOT / ".ci" / "release_check.py")
assert SPEC is not None and SPEC.loader is not None
release_check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release_check)


@pytest.fixture
def tree(tmp_path):
    """A repository that can be released."""
    for folder in ("fxq", "docs"):
        (tmp_path / folder).mkdir()
    for name in ("pyproject.toml", "fxq/version.py", "CITATION.cff", *release_check.PINS):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{VERSION}] - 2026-11-29\n")
    for command in (("init", "-q"), ("add", "."), ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    return tmp_path


def test_what_is_ready_has_no_faults(tree):
    assert release_check.faults(tree) == []


@pytest.mark.parametrize(
    ("file", "old", "message"),
    [
        ("fxq/version.py", VERSION, "fxq/version.py does not say"),
        ("CITATION.cff", VERSION, "CITATION.cff does not say"),
        ("CHANGELOG.md", f"[{VERSION}] -", "CHANGELOG.md has no heading"),
    ],
)
def test_what_does_not_agree_is_named(tree, file, old, message):
    path = tree / file
    path.write_text(path.read_text().replace(old, "9.9.9"))
    found = release_check.faults(tree)
    assert len(found) == 2 and found[0].startswith(message) and "working tree has changes" in found[1]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("requirements.txt", "rich==", "rich>=", "requirements.txt does not pin rich"),
        ("requirements.txt", "rich==15", "rich==12", r"requirements.txt has rich 12.0.0, pyproject.toml asks for >=13"),
        ("docs/requirements.txt", "mkdocs==1.6.1", "", "docs/requirements.txt has no mkdocs"),
    ],
)
def test_what_is_asked_for_is_pinned(tree, file, old, new, message):
    path = tree / file
    path.write_text(path.read_text().replace(old, new, 1))
    assert any(fault.startswith(message) for fault in release_check.faults(tree))


def test_a_version_is_released_once(tree):
    subprocess.run(["git", "-C", tree, "tag", f"v{VERSION}"], check=True)
    assert release_check.faults(tree) == [f"the tag v{VERSION} exists: raise the version"]


def test_the_workflow_calls_targets_that_exist():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    targets = {*matrix["target"], *(entry["target"].split()[0] for entry in matrix["include"])}
    nightly = jobs["all"]["steps"][-1]["run"]
    assert nightly == "make test-all"
    targets.add(nightly.removeprefix("make "))
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_workflow_runs_every_python_that_is_promised_and_the_oldest_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    matrix = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]["test"]["strategy"][
        "matrix"
    ]
    named = [
        line.rpartition(" ")[2]
        for line in project["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    ]
    assert named == matrix["python"] and project["requires-python"] == f">={named[0]}"
    (torch,) = (line.partition(">=")[2] for line in project["dependencies"] if line.startswith("torch"))
    assert f"test-torch TORCH={torch}.0" in [entry["target"] for entry in matrix["include"]]


def test_another_torch_takes_its_pin_and_what_goes_with_it_away():
    makefile = (ROOT / "Makefile").read_text()
    shown = f"{makefile}\nshow:\n\t@sed $(OTHER_TORCH) requirements.txt\n"

    def pins(*given):
        made = subprocess.run(
            ["make", "-s", "-f", "-", "show", *given], cwd=ROOT, input=shown, capture_output=True, text=True, check=True
        )
        return made.stdout.splitlines()

    plain = (ROOT / "requirements.txt").read_text().splitlines()
    assert pins() == plain
    other = pins("TORCH=2.11.0")
    assert set(other) - set(plain) == {"torch==2.11.0", "setuptools>=77"}
    assert {line.partition("==")[0] for line in set(plain) - set(other)} == {"torch", "triton", "setuptools"}


def test_hooks_run_the_tools_of_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    for hook in hooks:
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert f"$(BIN)/{tool}" in lint


def test_a_checkout_without_links_says_what_to_do(tmp_path):
    package = tmp_path / "fxq"
    package.mkdir()
    shutil.copy(ROOT / "fxq" / "__init__.py", package)
    (package / "passes").write_text("../passes")
    done = subprocess.run(
        [sys.executable, "-c", "import fxq"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode and "git config core.symlinks true" in done.stderr
