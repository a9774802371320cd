"""The tree: links, packages and the direction of imports."""

import ast
import fnmatch
import functools
import graphlib
import importlib
import os
import pathlib
import re
import sys
import tomllib
from collections import Counter

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("passes", "kernels", "export")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]

# From the ground up. What lies on a floor imports from its own floor and from those below.
FLOORS = (
    ("numerics", "version", "cpu", "dtypes", "plugins"),
    ("kernels",),
    ("runtime", "calls", "core", "cache", "shadowed"),
    ("capture", "calibration"),
    ("models", "metrics", "passes", "environment"),
    ("presets", "recipes", "recipe_files", "export", "report"),
    ("job", "optimize", "parallel", "planning"),
    ("quantize", "integrations"),
    ("fxq", "lab", "bench"),
    ("demo", "comparison"),
    ("play",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


@functools.cache
def sources():
    """(dotted module, file) of every library source, each file once."""
    return tuple(_sources())


def _sources():
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


@functools.cache
def imports(path):
    """(module of fxq, line) for every import in a file; names of a package's __init__ count as the package."""
    return tuple(_imports(path))


def _imports(path):
    modules = {module for module, _ in sources()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{a.name}" for a in node.names]
            names = [name if name in modules else node.module for name in names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "fxq")


def test_every_room_has_its_floor():
    rooms = {room_of(module) for module, _ in sources()}
    assert rooms == set(FLOOR), f"no floor: {sorted(rooms - set(FLOOR))}; no such room: {sorted(set(FLOOR) - rooms)}"


def test_no_import_goes_up():
    up = [
        f"{path.relative_to(ROOT)}:{line}: {room_of(module)} must not import {room_of(target)}"
        for module, path in sources()
        for target, line in imports(path)
        if FLOOR[room_of(target)] > FLOOR[room_of(module)]
    ]
    assert not up, "\n".join(up)


def folder_of(module, packages):
    """The folder that a module lies in; an __init__ is the roof of its folder, and a module of the top a room alone."""
    folder = module.rpartition(".")[0]
    return f"{module}.__init__" if module in packages else module if folder == "fxq" else folder


@pytest.mark.parametrize("of", ["modules", "folders"])
def test_no_imports_go_in_a_circle(of):
    packages = {module for module, path in sources() if path.name == "__init__.py"}
    graph = {}
    for module, path in sources():
        name = module if of == "modules" else folder_of(module, packages)
        targets = [target for target, _ in imports(path) if of == "modules" or target not in packages]
        named = [target if of == "modules" else folder_of(target, packages) for target in targets]
        graph.setdefault(name, set()).update(set(named) - {name})
    if of == "modules":  # a package is there before its modules are, whoever asks for them
        graph = {name: {t for t in targets if not name.startswith(f"{t}.")} for name, targets in graph.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_no_folder_is_a_heap():
    folders = Counter(path.parent.relative_to(ROOT) for _, path in sources() if path.name != "__init__.py")
    heaps = {str(folder): count for folder, count in folders.items() if count >= 16}
    assert not heaps, f"make rooms: {heaps}"


def test_every_folder_says_what_lives_there_and_what_may_not():
    silent = []
    for module, path in sources():
        if path.name == "__init__.py" and module != "fxq":
            said = ast.get_docstring(ast.parse(path.read_text())) or ""
            if not re.search(r"\.\s+Nothing [^.]+\.", said):
                silent.append(module)
    assert not silent, f"a sentence on what lives there, one that begins with 'Nothing': {silent}"


TESTED_ELSEWHERE = {
    "attacks/test_foreign_code.py": "export.graph.arguments export.graph.foreign export.graph.graph_json"
    " export.graph.operators export.graph.stored export.graph.structure",
    "attacks/test_fuzz.py": "export.graph.rehearsal export.graph.strict",
    "attacks/test_native_cache.py": "kernels.native.build kernels.native.cache",
    "attacks/test_other_files.py": "models.archives",
    "attacks/test_programs.py": "export.native_code export.pickled",
    "attacks/test_resources.py": "runtime.reading",
    "bench/test_ours.py": "bench.cases bench.problems",
    "bench/test_report.py": "bench.plot",
    "bench/test_rivals.py": "bench.floats bench.onnx_rivals",
    "cache/codecs/test_codecs.py": "cache.codecs.*",
    "cache/test_rollout.py": "cache.policy",
    "capture/test_dense_masks.py": "capture.regions",
    "capture/test_guards.py": "capture.written_guards",
    "capture/test_small_sizes.py": "capture.comparisons",
    "cli/test_bench.py": "bench.levels bench.rollout",
    "cli/test_cli.py": "cli.demo cli.quantize",
    "cli/test_diffusers.py": "cli.options.source",
    "cli/test_recipe.py": "recipe_files",
    "demo/test_run.py": "lab",
    "export/interop/test_layers.py": "export.interop.names models.published.names",
    "export/interop/test_lightx2v.py": "export.interop.blocks",
    "export/test_diffusers_classes.py": "integrations.diffusers",
    "export/test_interop_targets.py": "export.interop.*",
    "export/hub/test_commands.py": "cli.hub",
    "export/test_onnx.py": "export.capture models.runtime",
    "kernels/gemm/test_activations.py": "kernels.gemm.epilogues",
    "kernels/attention/test_stored_integers.py": "kernels.native.coded",
    "kernels/attention/encoded/test_sides.py": "kernels.native.unpack",
    "kernels/test_launches.py": "kernels.device",
    "kernels/test_native.py": "kernels.gemm.panels",
    "kernels/test_ops.py": "kernels.arguments kernels.arguments_fp8 kernels.op kernels.rows kernels.*.op"
    " kernels.*.per_token kernels.gemm.activated",
    "kernels/test_triton_interpret.py": "kernels.jit kernels.*.triton kernels.*.triton_*",
    "models/test_checkpoints.py": "models.loading",
    "models/test_lora.py": "models.lora_config",
    "models/test_official_parity.py": "models.self_forcing",
    "models/test_saved_state.py": "cache.saved models.tiny",
    "parallel/test_tensor.py": "parallel.axes parallel.groups parallel.plan parallel.shard_graph",
    "passes/fusions/test_fuse_rotary.py": "passes.match.rotations",
    "passes/match/test_axis_groups.py": "passes.match.axis_rules",
    "passes/test_pack_cache.py": "passes.match.inputs",
    "passes/qdq/test_to_qdq.py": "passes.qdq.qdq_layers",
    "planning/test_doctor.py": "planning.environment planning.gains",
    "planning/test_job.py": "planning.drive planning.speed",
    "planning/test_memory.py": "planning.estimate",
    "planning/test_plan.py": "cli.plan planning.report planning.tables",
    "planning/test_workloads.py": "models.families",
    "report/test_html.py": "report.charts",
    "report/test_tables.py": "report.verdict",
    "runtime/test_ranks.py": "calibration.agreement parallel.handshake",
    "test_growth.py": "runtime.generated",
}
"""Test file -> modules of another name that it tests, below ``fxq``; ``*`` for any."""

DECLARATIONS = "__main__ version report.data"
"""Modules that hold nothing to test."""


def test_every_module_has_tests_of_its_name_or_named_here():
    modules = {module.removeprefix("fxq.") for module, path in sources() if path.name != "__init__.py"}
    own = {module for module in modules if (ROOT / "tests" / own_tests(module)).is_file()}
    missing, idle = modules - own - set(DECLARATIONS.split()), []
    for file, patterns in TESTED_ELSEWHERE.items():
        assert (ROOT / "tests" / file).is_file(), f"no tests/{file}"
        for pattern in patterns.split():
            if not (found := set(fnmatch.filter(modules - own, pattern))):
                idle.append(f"{file}: {pattern}")
            missing -= found
    assert not missing, f"write tests of: {sorted((module, own_tests(module)) for module in missing)}"
    assert not idle, f"is no module, or has tests of its own: {idle}"


def own_tests(module):
    """Where the tests of a module lie, below ``tests``."""
    *rooms, name = module.split(".")
    return "/".join((*rooms, f"test_{name}.py"))


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
        if module not in ("fxq.core.ir", "fxq.calls.captured")  # the second: notes of modules, for their copies
        for number in meta_reads(path.read_text())
    ]
    assert not offenders, f"use the helpers of fxq/core/ir.py: {offenders}"


def numbered_reads(text):
    """Lines that take an argument of a node by its place, or replace it there; the first is an operator's input."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "args":
            if not (isinstance(node.slice, ast.Constant) and node.slice.value == 0):
                yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr == "update_arg":
            yield node.lineno


@pytest.mark.parametrize("line", ["x.args[6]", "x.args[:7]", "x.args[-1]", "x.args[i]", "x.update_arg(6, 4)"])
def test_every_way_to_read_an_argument_by_its_place_is_seen(line):
    assert list(numbered_reads(f"y = x.args[0]\n{line}\nz = args[1]\n")) == [2]


def test_arguments_of_operators_are_read_by_name():
    """But for items of tuples (``getitem`` has no schema), and calls in graphs that torch.export did not capture."""
    by_place = ("fxq.core.layer", "fxq.capture.regions", "fxq.capture.dense_masks", "fxq.integrations.dynamo_graph")
    offenders = [
        f"{path.relative_to(ROOT)}:{number}"
        for module, path in sources()
        if module not in by_place
        for number in numbered_reads(path.read_text())
    ]
    assert not offenders, f"use fxq.core.graph.arguments or QuantizedLayer: {offenders}"


def test_every_declared_dependency_is_pinned_at_an_allowed_version():
    pinned = dict(re.findall(r"^([a-z0-9-]+)==([^;\s]+)", (ROOT / "requirements.txt").read_text(), re.M))
    project = PROJECT["project"]
    for declared in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        assert declared.name in pinned, f"{declared.name} has no pin in requirements.txt"
        assert declared.specifier.contains(pinned[declared.name]), f"{declared}: pinned {pinned[declared.name]}"


def test_files_have_at_most_350_lines_and_functions_80():
    long = []
    for name, path in sources():
        text = path.read_text()
        if (count := len(text.splitlines())) > 350:
            long.append(f"{name}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (count := node.end_lineno - node.lineno + 1) > 80:
                long.append(f"{name}.{node.name}: {count} lines")
    assert not long
