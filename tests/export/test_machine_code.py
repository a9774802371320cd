"""Compiled programs on CPUs that differ from the one that compiled them."""

import json
import pathlib
import shutil
import warnings

import pytest
import torch

import fxq
from fxq import cpu
from fxq.export.capture import ExportError
from fxq.export.machine_code import compiled_for, refuse_other_cpu
from fxq.export.program import export_program, load_program, read_program
from tests.toys import recipe, relative_error, rows, toy

FILE = pathlib.Path("folder/program.json")
AVX2 = frozenset({"sse4_2", "avx2", "fma3", "aes"})


@pytest.fixture
def small(monkeypatch):
    """A CPU with AVX2 only."""
    monkeypatch.setattr(cpu, "features", lambda limited=True: AVX2)
    monkeypatch.setattr(cpu, "saturates", lambda: True)


def test_a_program_is_refused_where_the_cpu_lacks_what_it_was_compiled_with(small):
    refuse_other_cpu(FILE, {"cpu": ["avx2", "fma3"]})
    with pytest.raises(ExportError, match=r"folder: compiled for a CPU with avx512_vnni, which this one does not have"):
        refuse_other_cpu(FILE, {"cpu": ["avx2", "avx512_vnni"]})


def test_the_advice_of_the_refusal_holds(small):
    with pytest.raises(ExportError, match="export it here, or with FXQ_CPU=avx2 for every CPU that has AVX2"):
        refuse_other_cpu(FILE, {"cpu": ["avx512_vnni"]})
    refuse_other_cpu(FILE, {"cpu": compiled_for()})


def test_only_instructions_that_compilers_use_are_recorded(small):
    assert compiled_for() == ["avx2", "fma3", "sse4_2"]


@pytest.mark.parametrize("value", ["avx2", [1], {"avx2": True}])
def test_a_damaged_list_of_instructions_is_refused(value):
    with pytest.raises(ExportError, match="the program is damaged, export it again"):
        refuse_other_cpu(FILE, {"cpu": value})


def test_older_programs_that_may_saturate_are_warned_of(small):
    with pytest.warns(RuntimeWarning, match="this CPU has no VNNI.* 8-bit products may saturate: export it again"):
        refuse_other_cpu(FILE, {"integer_products": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_other_cpu(FILE, {"integer_products": 0})


@pytest.mark.sweep
def test_a_program_compiled_without_vnni_is_exact_and_one_of_another_cpu_is_refused(tmp_path, monkeypatch):
    x = rows(9, 96)
    q = fxq.quantize(toy(), [x], recipe(8), progress=False)
    monkeypatch.setattr(cpu, "saturates", lambda: True)
    folder = export_program(q, tmp_path / "program", aoti=True)
    assert read_program(folder)["integer_products"] == 6
    large = rows(64, 96, seed=3) * 3
    assert relative_error(q, load_program(folder), large) < 1e-3
    other = shutil.copytree(folder, tmp_path / "other")
    facts = json.loads((other / "program.json").read_text())
    assert facts["cpu"] == compiled_for()
    facts["cpu"].append("avx9000")
    (other / "program.json").write_text(json.dumps(facts))
    with pytest.raises(ExportError, match="compiled for a CPU with avx9000"):
        load_program(other)
    assert torch.isfinite(load_program(folder)(x)).all()
