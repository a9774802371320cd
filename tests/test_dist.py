"""What is shipped, installed into an environment of its own outside of the checkout."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

from tests.test_layout import ROOMS, ROOT, SETUPTOOLS, sources

pytestmark = pytest.mark.slow
LEFT_OUT = shutil.ignore_patterns(".*", "out", "runs", "build", "dist", "*.egg-info", "__pycache__")


def run(*command, **options):
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [*map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False, env=outside, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Folder with the source distribution of a copy of the checkout, and the wheel that was built from it."""
    place = tmp_path_factory.mktemp("dist")
    tree = shutil.copytree(ROOT, place / "tree", symlinks=True, ignore=LEFT_OUT)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", place / "out", tree)
    return place / "out"


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """An environment with the wheel alone; its dependencies are read from this one, whose editable fxq is not."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    packages = pathlib.Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    return python, packages


def test_the_wheel_holds_every_source_and_data_file(dist):
    (wheel,) = dist.glob("fxq-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        everything = archive.namelist()
    names = {name for name in everything if name.startswith("fxq/")}
    expected = {
        module.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        for module, path in sources()
        if module in SETUPTOOLS["packages"] or module.rpartition(".")[0] in SETUPTOOLS["packages"]
    }
    data = {
        str(path.relative_to(ROOT))
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert names == expected | data
    assert "fxq/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in everything)
    assert not any(name.split("/")[0] in ROOMS for name in everything)


def test_the_source_distribution_builds_without_links(dist):
    (archive,) = dist.glob("fxq-*.tar.gz")
    with tarfile.open(archive) as content:
        members = content.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.partition("/")[2] for member in members}
    assert {"pyproject.toml", "README.md", "LICENSE", "passes/__init__.py", "kernels/native/linear.cpp"} <= names
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"} <= names


@pytest.mark.sweep
def test_an_environment_of_the_wheel_quantizes_and_verifies(installed, tmp_path):
    python, packages = installed
    fxq = python.with_name("fxq")
    code = "import fxq.passes, fxq.kernels, fxq.export as e; print(fxq.__file__, fxq.passes.__file__, e.__file__)"
    for place in run(python, "-c", code, cwd=tmp_path).split():
        assert packages in pathlib.Path(place).parents and not pathlib.Path(place).parent.is_symlink()
    assert run(fxq, "--version", cwd=tmp_path).startswith("fxq ")
    run(fxq, "quantize", "--recipe", "w8a8-dynamic", "--out", "b", "--quiet", cwd=tmp_path)
    assert json.loads(run(fxq, "verify", "b", "--json", cwd=tmp_path))["ok"]
    found = json.loads(run(fxq, "doctor", "--json", cwd=tmp_path))
    assert found["ok"] and any(check["kernel"].startswith("native") for check in found["operators"])


@pytest.mark.sweep
def test_importing_it_loads_no_extra(installed, tmp_path):
    python, _ = installed
    extras = ("onnx", "onnxscript", "onnxruntime", "matplotlib", "PIL", "av", "huggingface_hub", "diffusers")
    code = f"import fxq, sys; print([name for name in {extras} if name in sys.modules])"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "[]"
