"""The kernels for AArch64, compiled as the product compiles them and run in an emulator: as int64, and as on x86."""

from __future__ import annotations

import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from fxq import cpu
from fxq.kernels.native import build
from fxq.kernels.native.cache import cache_folder
from tests import features
from tests.features import ROOT, needs

pytestmark = [pytest.mark.slow, needs("emulated")]

SOURCE, LIBRARIES = ROOT / "tests" / "machine" / "kernels.cpp", "/usr/aarch64-linux-gnu"
FLAGS = ["-std=c++17", "-O1", "-fopenmp", "-ffp-contract=off", "-I", str(build.FOLDER)]
ON = [(build.DOTPROD, "neoverse-n1"), (build.I8MM, "max")]
NONE = ["cortex-a57", "cortex-a72"]


def compiled(compiler: str, target: build.InstructionSet, folder: pathlib.Path) -> pathlib.Path:
    """The program with the library for an instruction set."""
    program = folder / target.kernel.replace(" ", "_")
    if not program.exists():
        library = build.build(compiler, cache_folder(), target)
        command = [*shlex.split(compiler), *FLAGS, str(SOURCE), str(library), "-o", str(program)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


def emulate(target, model, folder, argument):
    program = compiled(shutil.which(features.CROSS_COMPILER), target, folder)
    command = [features.EMULATOR, "-L", LIBRARIES, "-cpu", model, str(program), str(argument)]
    return subprocess.run(command, capture_output=True, text=True)


def read(file: pathlib.Path) -> dict[str, bytes]:
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):
        end = data.index(b"\n", at)
        name, size = data[at:end].decode().rsplit(" ", 1)
        assert name not in found
        at = end + 1 + int(size)
        found[name] = data[end + 1 : at]
    return found


@pytest.fixture(scope="module")
def on_x86(folder):
    """Results of the kernels for AVX2, which other tests compare with the references."""
    features.library_for(build.AVX2)
    file = folder / "x86"
    subprocess.run([compiled(build.compiler(), build.AVX2, folder), file], check=True)
    return read(file)


@pytest.mark.parametrize(("target", "model"), ON, ids=lambda found: getattr(found, "kernel", found))
def test_integers_are_those_of_int64_and_all_results_the_bits_of_x86(target, model, folder, on_x86):
    file = folder / f"{target.kernel}-{model}"
    done = emulate(target, model, folder, file)
    assert done.returncode == 0, done.stderr
    got = read(file)
    assert got.keys() == on_x86.keys() and len(got) > 500
    assert [name for name, data in got.items() if data != on_x86[name]] == []


@pytest.mark.parametrize("model", [*NONE, "neoverse-n1", "max"])
def test_no_cpu_gets_kernels_that_it_lacks_instructions_for(model, folder, monkeypatch):
    said = emulate(build.DOTPROD, model, folder, "hwcap").stdout.split()
    found = cpu.of_hwcap(*map(int, said))
    monkeypatch.setattr(cpu, "features", lambda limited=True: frozenset(found))
    monkeypatch.setattr(build, "SETS", build.ARCHITECTURES["aarch64"])
    chosen = build.instruction_set()
    assert chosen is (None if model in NONE else build.DOTPROD if model == "neoverse-n1" else build.I8MM)
    # What is chosen is the fastest that does not stop with an illegal instruction.
    file = folder / f"of-{model}"
    better = [one for one in build.SETS if chosen is None or build.SETS.index(one) < build.SETS.index(chosen)]
    for one in better:
        assert "Illegal instruction" in emulate(one, model, folder, file).stderr


def test_each_library_multiplies_by_its_instructions_and_keeps_sums_in_registers():
    code = {}
    for target in (build.DOTPROD, build.I8MM):
        file = build.build(shutil.which(features.CROSS_COMPILER), cache_folder(), target)
        command = [features.CROSS_COMPILER.replace("g++", "objdump"), "-d", "--no-show-raw-insn", str(file)]
        code[target] = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "sdot" in code[build.DOTPROD] and "smmla" not in code[build.DOTPROD] and "smmla" in code[build.I8MM]
    for text in code.values():
        loops = re.findall(r"<\w*multiply_(?:bytes|pairs|float|code|word)\w*>:\n(.*?)\n\n", text, re.S)
        assert loops
        assert not re.findall(r"\t(?:ld|st)[rp]\tq\d+.*\[sp", "\n".join(loops))
