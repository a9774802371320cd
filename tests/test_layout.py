"""The tree: links, packages and the direction of imports."""

import ast
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("passes", "kernels", "export")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]

# Imports go to the same layer or a lower one.
LAYERS = (
    (
        "allocator",
        "config",
        "cpu",
        "numerics",
        "units",
        "ambient",
        "rollout",
        "models",
        "metrics",
        "progress",
        "reading",
        "residency",
        "reach",
        "offload",
        "fixed_dtypes",
        "content",
        "workers",
        "checkpoint",
        "agreement",
        "exclusive",
        "generated",
        "ranks",
        "streams",
        "writable",
    ),
    ("ir", "calls", "captured", "conditions"),
    (
        "graph",
        "products",
        "signature",
        "interpret",
        "places",
        "regions",
        "dense_masks",
        "aliasing",
        "guards",
        "small_sizes",
        "comparisons",
        "written_guards",
    ),
    ("verify",),
    ("pipeline",),
    ("trace", "row_sample", "collect", "calibrate"),
)
CORE = tuple(name for layer in LAYERS for name in layer)
USER_FACING = (
    "handshake",
    "job",
    "quantize",
    "optimize",
    "summary",
    "sensitivity",
    "apply",
    "quantized_linear",
    "stand_in",
    "names",
    "parallel",
    "diffusers_quantizer",
    "binding",
    "dynamo_graph",
    "record",
    "backend",
    "report",
    "bench",
    "planning",
    "lab",
    "adapters",
    "cli",
    "demo",
    "fxq",
)

# room -> rooms it must not import; "fxq" is the package's own __init__, which imports almost everything.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    **{
        name: (*(n for above in LAYERS[i + 1 :] for n in above), "passes", "export", "recipes", *USER_FACING)
        for i, layer in enumerate(LAYERS)
        for name in layer
    },
    "kernels": (*(n for n in CORE if n not in ("cpu", "numerics")), "passes", "export", "recipes", *USER_FACING),
    "passes": ("models", "metrics", "trace", "export", "recipes", *USER_FACING),
    "export": ("models", "metrics", "trace", "calibrate", "recipes", *USER_FACING),
    "cache": (*(n for n in CORE if n not in ("numerics", "rollout")), "passes", "export", *USER_FACING),
    "recipes": USER_FACING,
    "recipe_files": ("passes", "export", "recipes", *USER_FACING),
    **{
        name: ("adapters", "bench", "cli", "demo", "lab", "report")
        for name in (
            "handshake",
            "job",
            "quantize",
            "optimize",
            "summary",
            "sensitivity",
            "apply",
            "quantized_linear",
            "stand_in",
            "names",
            "diffusers_quantizer",
            "binding",
            "dynamo_graph",
            "record",
            "backend",
        )
    },
    "parallel": (
        "job",
        "quantize",
        "optimize",
        "apply",
        "adapters",
        "bench",
        "cli",
        "demo",
        "lab",
        "report",
        "planning",
    ),
    "report": ("adapters", "bench", "cli", "demo", "lab"),
    "lab": ("adapters", "bench", "cli", "demo"),
    "demo": ("adapters", "bench", "cli"),
    "adapters": ("bench", "cli", "demo"),
    "bench": ("cli", "demo", "lab", "report"),
    "planning": ("export", "quantize", "optimize", "adapters", "bench", "cli", "demo", "lab", "report"),
}
FORBIDDEN |= {name: FORBIDDEN["numerics"] for name in ("checkpoint", "reading", "residency", "workers")}
for foundation in (*LAYERS[0], "checkpoint", "reading", "residency", "workers"):
    FORBIDDEN[foundation] += ("kernels",)


def test_every_module_has_its_place_in_the_import_order():
    modules = {p.stem for p in (ROOT / "fxq").glob("*.py")} - {"__init__", "__main__"}
    modules = {name for name in modules if name.partition("_")[0] != "cli"}
    assert modules <= set(FORBIDDEN), f"add to LAYERS or FORBIDDEN: {sorted(modules - set(FORBIDDEN))}"


def sources():
    """(dotted module, file) of every library source, each file once."""
    for folder in ("fxq", *ROOMS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if folder == "fxq" and relative.parts[1] in ROOMS:
                continue
            parts = relative.with_suffix("").parts
            parts = parts if folder == "fxq" else ("fxq", *parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def room_of(module):
    """First part below ``fxq``; ``fxq`` itself for the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports(path):
    """Rooms of fxq that a file imports, with line numbers."""
    modules = {module for module, _ in sources()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
            if node.module == "fxq":
                names = [f"fxq.{a.name}" if f"fxq.{a.name}" in modules else "fxq" for a in node.names]
        else:
            continue
        yield from ((room_of(name), node.lineno) for name in names if name.split(".")[0] == "fxq")


@pytest.mark.parametrize("room", ROOMS)
def test_links_point_to_the_top_level_folders(room):
    link = ROOT / "fxq" / room
    assert link.is_symlink(), f"fxq/{room} must be a link; was it checked out without symlink support?"
    assert os.readlink(link) == f"../{room}"
    assert (ROOT / room / "__init__.py").is_file()


def test_packages_in_pyproject_are_the_folders_with_an_init():
    folders = {
        path.parent.relative_to(ROOT)
        for folder in ("fxq", *ROOMS)
        for path in (ROOT / folder).rglob("__init__.py")
        if not (folder == "fxq" and path.relative_to(ROOT).parts[1] in ROOMS)
    }
    packages = {".".join(f.parts if f.parts[0] == "fxq" else ("fxq", *f.parts)) for f in folders}
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages)


def test_package_dir_maps_every_room_to_its_folder():
    mapped = {p: p.removeprefix("fxq.").replace(".", "/") for p in SETUPTOOLS["packages"] if room_of(p) in ROOMS}
    assert SETUPTOOLS["package-dir"] == mapped


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_from_the_root_says_how_to_import_it(room, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=f"import fxq.{room}"):
        importlib.import_module(room)
    assert room not in sys.modules


def test_imports_go_downwards_only():
    violations = []
    for module, path in sources():
        room = room_of(module)
        if module == "fxq" or room not in FORBIDDEN:
            continue
        for target, line in imports(path):
            if target in FORBIDDEN[room]:
                violations.append(f"{path.relative_to(ROOT)}:{line}: {room} must not import {target}")
    assert not violations, "\n".join(violations)


def test_imports_are_absolute():
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for _, path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative, relative


def meta_reads(text):
    """Lines that touch an attribute ``meta``, however: ``x.meta[...]``, ``x.meta.get(...)``, ``getattr(x, "meta")``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names = [value.value for value in node.args[1:2] if isinstance(value, ast.Constant)]
        else:
            names = [node.attr] if isinstance(node, ast.Attribute) else []
        if "meta" in names:
            yield node.lineno


@pytest.mark.parametrize(
    "line", ["x.meta['val']", "x.meta.get('val')", "x.meta.update(a=1)", "m = x.meta", "getattr(x, 'meta', {})"]
)
def test_every_way_to_touch_meta_is_seen(line):
    assert list(meta_reads(f"y = 1\n{line}\nz = torch.device('meta')\n")) == [2]


def test_only_ir_touches_node_meta():
    offenders = [
        f"{path.relative_to(ROOT)}:{number}"
        for module, path in sources()
        if module not in ("fxq.ir", "fxq.captured")  # the second: notes of modules, for their copies
        for number in meta_reads(path.read_text())
    ]
    assert not offenders, f"use the helpers of fxq/ir.py: {offenders}"


def test_every_declared_dependency_is_pinned_at_an_allowed_version():
    pinned = dict(re.findall(r"^([a-z0-9-]+)==([^;\s]+)", (ROOT / "requirements.txt").read_text(), re.M))
    project = PROJECT["project"]
    for declared in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        assert declared.name in pinned, f"{declared.name} has no pin in requirements.txt"
        assert declared.specifier.contains(pinned[declared.name]), f"{declared}: pinned {pinned[declared.name]}"


@pytest.mark.slow
def test_the_wheel_holds_every_source_and_data_file(tmp_path):
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns(".*", "out", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=skipped)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(tree),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("fxq-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if n.startswith("fxq/")}
        everything = archive.namelist()
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
    assert any(n.endswith("licenses/LICENSE") for n in everything)
    assert not any(n.split("/")[0] in ROOMS for n in everything)
