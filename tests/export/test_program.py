import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

import fxq
from fxq.calls.rules import InputError
from fxq.core.ir import inherit_meta
from fxq.export.capture import ExportError
from fxq.export.program import export_program, load_program, read_program
from tests.toys import recipe, relative_error, rows, toy, wan_rollout

X = rows(9, 96)
FILES = ["graph.json", "manifest.json", "model.safetensors", "program.json", "program.pt2"]


@pytest.fixture(scope="module")
def quantized():
    return fxq.quantize(toy(), [X], recipe(4), progress=False)


@pytest.fixture(scope="module")
def original(quantized, tmp_path_factory):
    return export_program(quantized, tmp_path_factory.mktemp("programs") / "toy", metadata={"layers": 1})


@pytest.fixture
def program(original, tmp_path):
    return shutil.copytree(original, tmp_path / "toy")


@pytest.fixture(scope="module")
def compiled(quantized, tmp_path_factory):
    return export_program(quantized, tmp_path_factory.mktemp("programs") / "aoti", aoti=True, metadata={"layers": 1})


def change(folder, **fields):
    """Edit the facts and make the hashes fit, as an attacker would."""
    file = folder / "program.json"
    data = json.loads(file.read_text()) | fields
    data["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in data["files"]}
    file.write_text(json.dumps(data))


def in_fresh_process(code, *arguments, cwd):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr


def test_a_weight_free_program_loads_and_computes_the_same(original, quantized):
    loaded = load_program(original)
    for count in (1, 9, 40):
        x = rows(count, 96, seed=count)
        assert relative_error(quantized, loaded, x) < 1e-6
    assert sorted(entry.name for entry in original.iterdir()) == FILES
    assert read_program(original)["runtime"] == {"layers": 1}


LOAD = """
import sys, torch
from fxq.export.program import load_program
torch.save(load_program(sys.argv[1])(torch.load(sys.argv[2])).detach(), sys.argv[3])
"""

PLAIN = """
import sys, torch, fxq
from safetensors.torch import load_file
module = torch.export.load(sys.argv[1] + "/program.pt2").module()
module.load_state_dict(load_file(sys.argv[1] + "/model.safetensors"), assign=True)
torch.save(module(torch.load(sys.argv[2])).detach(), sys.argv[3])
"""


@pytest.mark.parametrize(
    "code",
    [pytest.param(LOAD, id="load_program", marks=pytest.mark.sweep), pytest.param(PLAIN, id="torch.export.load")],
)
def test_a_fresh_process_reads_the_weight_free_program(original, quantized, tmp_path, code):
    torch.save(X, tmp_path / "x")
    in_fresh_process(code, original, tmp_path / "x", tmp_path / "y", cwd=pathlib.Path(fxq.__file__).parents[1])
    torch.testing.assert_close(torch.load(tmp_path / "y"), quantized(X).detach(), rtol=1e-5, atol=1e-6)


def test_the_archive_holds_no_tensor_no_pickle_and_no_path(original):
    with zipfile.ZipFile(original / "program.pt2") as archive:
        sizes = {info.filename.partition("/")[2]: info.file_size for info in archive.infolist()}
        content = archive.read(next(n for n in archive.namelist() if n.endswith("models/model.json")))
    assert all(not size for name, size in sizes.items() if name.startswith("data/weights/weight_"))
    assert sizes["data/sample_inputs/model.pt"] == 0
    assert b".py" not in content
    assert content.count(b"fxq.dual_scale_linear.default") == 2


@pytest.mark.any_cpu
def test_sizes_vary_in_the_program_as_in_the_module(tmp_path):
    rollout = wan_rollout()
    q = fxq.quantize(rollout.denoiser, rollout, recipe(8), progress=False)
    folder = export_program(q, tmp_path / "wan")
    program = torch.export.load(folder / "program.pt2")
    shapes = {n.name: n.meta["val"].shape for n in program.graph.find_nodes(op="placeholder")}
    assert [isinstance(size, torch.SymInt) for size in shapes["prefix_k_0"]] == [True, True, False, False]
    assert str(shapes["prefix_k_0"][1]) != str(shapes["cross_k_0"][1])
    assert str(shapes["prefix_k_0"][0]) == str(shapes["x"][0])
    with rollout.using(load_program(folder)):
        got = rollout.rollout(*rollout.batches[0])
    with rollout.using(q):
        torch.testing.assert_close(rollout.rollout(*rollout.batches[0]), got, rtol=0.01, atol=0.01)


def test_a_pickle_put_into_the_archive_is_never_read(program, quantized, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = b"cposix\nsystem\n(S'touch pwned'\ntR."
    with zipfile.ZipFile(program / "program.pt2", "w") as archive:
        archive.writestr("program/data/sample_inputs/model.pt", evil)
    with pytest.raises(ExportError, match=r"program.pt2 does not have the hash"):
        load_program(program)
    change(program)
    assert relative_error(quantized, load_program(program), X) < 1e-6
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(program, name):
    (program / name).unlink()
    with pytest.raises(ExportError, match=rf"{name}(: No such file| is missing)"):
        load_program(program)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 50, -1])
def test_a_truncated_file_is_named(program, name, keep):
    (program / name).write_bytes((program / name).read_bytes()[:keep])
    with pytest.raises(ExportError, match=f"{name}.*(truncated or altered|not valid JSON)"):
        load_program(program)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 7}, "format version 7, this fxq reads 1; export it again"),
        ({"kind": "onnx"}, "kind 'onnx' with files .*; the program is damaged"),
        ({"kind": "aoti"}, "kind 'aoti' with files .*; the program is damaged"),
    ],
)
def test_facts_of_another_kind_are_refused(program, fields, message):
    change(program, **fields)
    with pytest.raises(ExportError, match=message):
        load_program(program)


def test_an_altered_graph_is_refused_though_its_hash_fits(program):
    file = program / "graph.json"
    file.write_text(file.read_text().replace("aten.gelu.default", "aten.from_file.default"))
    change(program)
    with pytest.raises(ExportError, match=r"graph.json does not have the hash"):
        load_program(program)


def test_a_program_replaces_a_program_and_nothing_else(program, quantized):
    eight = fxq.quantize(toy(), [X], recipe(8), progress=False)
    export_program(eight, program)
    assert relative_error(eight, load_program(program), X) < 1e-6
    (program / "notes.md").write_text("mine")
    with pytest.raises(ExportError, match=r"the folder has other content \(notes.md\)"):
        export_program(quantized, program)


@pytest.mark.parametrize("aoti", [False, True])
def test_a_failed_export_leaves_the_old_program(program, quantized, tmp_path, monkeypatch, aoti):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxq.export.program.sha256", fail)
    monkeypatch.setattr("fxq.export.program._write_compiled", lambda *args: {})
    with pytest.raises(ExportError, match=r"cannot save .*No space left on device"):
        export_program(quantized, program, aoti=aoti)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["toy"]
    assert relative_error(quantized, load_program(program), X) < 1e-6


def test_modules_that_cannot_be_exported_say_why(quantized, tmp_path):
    with pytest.raises(ExportError, match="it carries no fxq facts"):
        export_program(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)), tmp_path / "x")
    with pytest.raises(ExportError, match="optimized for its device; export the module it was made from"):
        export_program(fxq.optimize(quantized), tmp_path / "x")
    loaded = fxq.load(fxq.save(quantized, tmp_path / "bundle"))
    for node in loaded.graph.nodes:
        inherit_meta(node, node, None)
    with pytest.raises(ExportError, match="no recorded example call"):
        export_program(loaded, tmp_path / "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


ONLY_TORCH = """
import sys, torch
from torch._inductor.package.package import load_package
x, found = torch.load(sys.argv[2]), []
for entry in ("denoise", "context"):
    run = load_package(sys.argv[1] + "/program.pt2", entry)
    found += [run(x), run(x[:1])]
assert "fxq" not in sys.modules
torch.save(found, sys.argv[3])
"""


@pytest.mark.sweep
def test_a_compiled_program_runs_where_only_torch_is_imported(compiled, quantized, tmp_path):
    torch.save(X, tmp_path / "x")
    in_fresh_process(ONLY_TORCH, compiled, tmp_path / "x", tmp_path / "y", cwd=tmp_path)
    found = torch.load(tmp_path / "y")
    for got, want in zip(found, [quantized(X), quantized(X[:1])] * 2, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.sweep
def test_a_compiled_program_multiplies_integers_only(compiled, quantized):
    facts = read_program(compiled)
    assert (facts["integer_products"], facts["imports"], facts["runtime"]) == (3, ["torch"], {"layers": 1})
    with zipfile.ZipFile(compiled / "program.pt2") as archive:
        assert not [name for name in archive.namelist() if name.endswith(".cpp")]
        libraries = [archive.read(name) for name in archive.namelist() if name.endswith(".so")]
    assert len(libraries) == 2
    assert all(b"fxq::" not in library and b"qlinear" in library for library in libraries)
    for entry in facts["entries"]:
        assert relative_error(quantized, load_program(compiled, entry), X) < 1e-5


@pytest.mark.sweep
def test_a_compiled_program_refuses_calls_it_was_not_compiled_for(compiled, quantized):
    run = load_program(compiled)
    for bad in (X[:, :48], torch.cat((X, X), 1), X[0], X.double(), X.half(), torch.ones(9, 96, dtype=torch.int64), 3):
        with pytest.raises(InputError, match=r"input x .* the graph was captured for"):
            run(bad)
    strided = torch.randn(96, 9).t()
    assert torch.allclose(run(strided), quantized(strided), atol=1e-4)


@pytest.mark.sweep
def test_a_compiled_program_of_another_version_or_entry_is_refused(compiled, tmp_path):
    folder = shutil.copytree(compiled, tmp_path / "aoti")
    with pytest.raises(ExportError, match="entry 'step': expected one of denoise, context"):
        load_program(folder, "step")
    change(folder, torch_version="2.9.1")
    with pytest.raises(ExportError, match=r"compiled by torch 2.9.1, this is .*; export it again"):
        load_program(folder)
    (folder / "program.pt2").write_bytes((folder / "program.pt2").read_bytes()[:-9])
    with pytest.raises(ExportError, match=r"program.pt2 does not have the hash"):
        load_program(folder)


@pytest.mark.sweep
def test_the_example_generates_the_video_of_fxq_with_torch_alone(tmp_path):
    script = pathlib.Path(__file__).parents[2] / "examples" / "aoti_rollout.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "56 integer products" in done.stdout
    assert float(done.stdout.split()[-1]) < 0.02


@pytest.mark.gpu
def test_a_compiled_program_on_cuda_calls_the_kernels_of_fxq(tmp_path):
    x = X.cuda().half()
    q = fxq.quantize(toy().cuda().half(), [x], recipe(8), progress=False)
    folder = export_program(q, tmp_path / "cuda", aoti=True)
    assert read_program(folder)["imports"] == ["torch", "fxq"]
    assert relative_error(q, load_program(folder), x) < 1e-3
