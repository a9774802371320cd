"""Attack 6: programs of torch.export, and the machine code of those compiled ahead of time."""

import json
import shutil
import types
import zipfile

import pytest
import torch
from torch.utils import _pytree as pytree

from fxq.calls.captured import convention
from fxq.export import native_code
from fxq.export.capture import ExportError
from fxq.export.compiled import call_facts
from fxq.export.files import sha256
from fxq.export.program import load_program, read_program


def edit(folder, **changes):
    """Change the facts and make the hashes fit."""
    file = folder / "program.json"
    data = json.loads(file.read_text()) | changes
    data["files"] = {name: sha256(folder / name) for name in data["files"]}
    file.write_text(json.dumps(data))


ENTRIES = ["", "denoise", ["denoise"], [""], [-1], [1e308], ["../x"], [[["x"]]], None, {"model": 1}, ["model", "model"]]


@pytest.mark.parametrize("entries", ENTRIES, ids=str)
def test_entries_are_those_of_the_kind(program, entries):
    edit(program, entries=entries)
    with pytest.raises(ExportError, match=r"entries .* the program is damaged"):
        load_program(program)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": True},
        {"format_version": "1"},
        {"format_version": 1.0},
        {"kind": ["weight_free"]},
        {"runtime": []},
        {"imports": "torch"},
        {"imports": [1]},
        {"torch_version": 2},
        {"fxq_version": None},
        {"integer_products": -1},
    ],
    ids=str,
)
def test_facts_of_a_wrong_type_are_refused(program, changes):
    edit(program, **changes)
    with pytest.raises(ExportError, match=r"the program is damaged|export it again"):
        load_program(program)


def test_a_nested_fact_is_refused_before_it_is_parsed(program):
    (program / "program.json").write_text('{"entries": ' + "[" * 2000 + "]" * 2000 + "}")
    with pytest.raises(ExportError, match="nested deeper than 100 levels"):
        read_program(program)


@pytest.fixture
def compiled(program, monkeypatch, tmp_path):
    """A folder that says it holds machine code, and a record of what is loaded."""
    monkeypatch.setenv("FXQ_CACHE_DIR", str(tmp_path / "cache"))
    module = load_program(program)
    for name in ("graph.json", "manifest.json", "model.safetensors"):
        (program / name).unlink()
    with zipfile.ZipFile(program / "program.pt2", "w") as archive:
        archive.writestr("data/aotinductor/denoise/x.so", b"\x7fELF" + bytes(100))
    call = call_facts(module)
    edit(program, kind="aoti", entries=["denoise", "context"], imports=["torch"], files={"program.pt2": ""}, call=call)
    loaded, spec = [], pytree.treespec_dumps(convention(module)[1])
    package = types.SimpleNamespace(loader=types.SimpleNamespace(get_call_spec=lambda: [spec, ""]))
    monkeypatch.setattr("torch._inductor.package.package.load_package", lambda *args: loaded.append(args) or package)
    return program, loaded


def test_machine_code_of_a_stranger_is_not_loaded_without_a_word(compiled):
    folder, loaded = compiled
    with pytest.raises(ExportError, match="machine code that this user did not export here"):
        load_program(folder)
    assert not loaded
    load_program(folder, allow_native_code=True)
    assert len(loaded) == 1 and loaded[0][1] == "denoise"


def test_machine_code_that_this_user_exported_is_loaded(compiled, monkeypatch):
    folder, loaded = compiled
    digest = sha256(folder / "program.pt2")
    native_code.note_as_own(digest)
    load_program(folder, "context")
    monkeypatch.setattr(native_code, "_NOTED", set())
    load_program(folder)
    assert [call[1] for call in loaded] == ["context", "denoise"], "the note outlives the process"
    (folder / "program.pt2").write_bytes((folder / "program.pt2").read_bytes() + b"x")
    edit(folder)
    with pytest.raises(ExportError, match="machine code that this user did not export"):
        load_program(folder)


def test_a_note_in_a_folder_of_others_does_not_count(compiled, monkeypatch, tmp_path):
    folder, _ = compiled
    native_code.note_as_own(sha256(folder / "program.pt2"))
    monkeypatch.setattr(native_code, "_NOTED", set())
    (tmp_path / "cache" / "programs").chmod(0o777)
    with pytest.raises(ExportError, match="machine code that this user did not export"):
        load_program(folder)


def test_the_hash_is_compared_before_the_word_counts(compiled):
    folder, loaded = compiled
    (folder / "program.pt2").write_bytes(b"another")
    with pytest.raises(ExportError, match="does not have the hash"):
        load_program(folder, allow_native_code=True)
    assert not loaded


PACKAGES = {
    "outside": ("../../x.so", b"x", "lies outside of it"),
    "absolute": ("/tmp/x.so", b"x", "lies outside of it"),
    "bomb": ("x.so", bytes(32 << 20), "unpacks to 33554432 bytes"),
}


@pytest.mark.parametrize("case", PACKAGES)
def test_archives_that_unpack_elsewhere_or_to_too_much_are_refused(compiled, case):
    folder, loaded = compiled
    name, content, message = PACKAGES[case]
    with zipfile.ZipFile(folder / "program.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    edit(folder)
    with pytest.raises(ExportError, match=message):
        load_program(folder, allow_native_code=True)
    assert not loaded


def test_a_file_that_is_no_archive_is_refused(compiled):
    folder, _ = compiled
    (folder / "program.pt2").write_bytes(b"\x7fELF")
    edit(folder)
    with pytest.raises(ExportError, match="is no package of torch"):
        load_program(folder, allow_native_code=True)


def test_a_weight_free_program_is_not_unpickled_whatever_its_hash(program, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.load", lambda *args, **kwargs: pytest.fail("something was unpickled"))
    monkeypatch.setattr("torch.export.load", lambda *args, **kwargs: pytest.fail("something was unpickled"))
    (program / "program.pt2").write_bytes(b"cposix\nsystem\n(S'touch pwned'\ntR.")
    edit(program)
    assert isinstance(load_program(program), torch.fx.GraphModule)


def test_a_program_whose_graph_is_forged_is_refused_as_the_bundle_is(program):
    file = program / "graph.json"
    file.write_text(file.read_text().replace("aten.gelu.default", "aten.rrelu.default"))
    edit(program)
    shutil.copytree(program, program.parent / "copy")
    with pytest.raises(ExportError, match="does not have the hash"):
        load_program(program.parent / "copy")
    manifest = program / "manifest.json"
    data = json.loads(manifest.read_text())
    data["files"]["graph.json"] = sha256(file)
    manifest.write_text(json.dumps(data))
    edit(program)
    with pytest.raises(ExportError, match=r"aten.rrelu.default' is not allowed in a bundle"):
        load_program(program)
