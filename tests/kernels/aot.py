"""Compile the shipped kernels for GPUs that need not be there and count what matters in their machine code.

    python -m tests.kernels.aot [--write] [name ...]

prints the counts of every case, or of the named ones; ``--write`` makes them the table that test_aot.py compares with.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from tests.kernels.aot_cases import CASES, Case

TABLE = Path(__file__).with_name("aot_table.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
TENSOR_CORE = re.compile(r"(IMMA|IGMMA|HMMA|HGMMA|QMMA|QGMMA|UTCQMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Counts:
    """What the compiler made of one kernel.

    Attributes:
        registers: per thread.
        spills: loads from and stores to local memory.
        shared: bytes of shared memory.
        tensor_core: opcode -> count of the tensor-core instructions.
        copies: asynchronous copies to shared memory, and how many of them move 16 bytes.
        loads: other loads from global memory, and how many of them move 16 bytes.
        stores: stores to global memory, and how many of them move 16 bytes.
        shared_stores: stores to shared memory.
        waits: how many warp-group products may stay in flight at each wait for them, on sm_90.
    """

    registers: int
    spills: int
    shared: int
    tensor_core: dict[str, int] = field(default_factory=dict)
    copies: tuple[int, int] = (0, 0)
    loads: tuple[int, int] = (0, 0)
    stores: tuple[int, int] = (0, 0)
    shared_stores: int = 0
    waits: str = ""


UNALIGNED = ("M", "S", "frame_rows")
"""Numbers of rows, of any size."""


def compile_case(case: Case, target: str) -> Any:
    """Compile as a launch does whose pointers and sizes, but for numbers of rows, are multiples of 16."""
    names = case.kernel.arg_names
    constants = case.constants | {"PTX": target.startswith("sm_")} if "PTX" in names else case.constants
    flat = [((i,), name, constants.get(name, case.types.get(name, "i32"))) for i, name in enumerate(names)]
    signature = {name: "constexpr" if name in constants else kind for _, name, kind in flat}
    known = {place: kind for place, name, kind in flat if name in constants}
    for place, name, kind in [entry for entry in flat if isinstance(entry[2], tuple)]:  # arguments that are tuples
        inner = [((*place, j), name, value) for j, value in enumerate(kind)]
        signature[name] = type(kind)(*(value if isinstance(value, str) else "constexpr" for value in kind))
        known |= {where: value for where, _, value in inner if not isinstance(value, str)}
        flat += [entry for entry in inner if isinstance(entry[2], str)]
    aligned = [
        where
        for where, name, kind in flat
        if where not in known and isinstance(kind, str) and kind[0] in "*i" and name not in UNALIGNED
    ]
    form = GluonASTSource if isinstance(case.kernel, GluonJITFunction) else ASTSource
    source = form(
        fn=case.kernel,
        signature=signature,
        constexprs=known,
        attrs={where: [["tt.divisibility", 16]] for where in aligned},
    )
    machine = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(source, target=machine, options={"num_warps": case.warps, "num_stages": case.stages})


def tool(name: str, *arguments: object) -> str:
    """Output of one of the NVIDIA tools inside Triton's wheel."""
    return subprocess.run([TOOLS / name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def count_nvidia(compiled: Any) -> Counts:
    """Counts of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = tool("cuobjdump", "--dump-resource-usage", cubin)
        opcodes = Counter(INSTRUCTION.findall(tool("nvdisasm", "-c", cubin)))
    registers = re.search(r"REG:(\d+)", resources)
    assert registers, resources
    tensor_core: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        if found := TENSOR_CORE.match(opcode):
            tensor_core[found.group(1)] += count

    def wide(pattern: str) -> tuple[int, int]:
        matching = [(opcode, count) for opcode, count in opcodes.items() if re.match(pattern, opcode)]
        return sum(count for _, count in matching), sum(
            count for opcode, count in matching if ".128" in opcode or opcode.startswith("UTMA")
        )

    return Counts(
        registers=int(registers.group(1)),
        spills=wide("LDL|STL")[0],
        shared=compiled.metadata.shared,
        tensor_core=dict(sorted(tensor_core.items())),
        copies=wide("LDGSTS|UTMALDG"),
        loads=wide(r"LDG\."),
        stores=wide(r"STG\."),
        shared_stores=wide(r"STS|STSM")[0],
        waits="".join(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", compiled.asm["ptx"])),
    )


def count_amd(compiled: Any) -> Counts:
    """Counts of AMD assembly."""
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    def wide(action: str) -> tuple[int, int]:
        found = re.findall(rf"\b(?:global|buffer)_{action}_(\w+)", text)
        return len(found), sum(width == "dwordx4" for width in found)

    return Counts(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        shared=compiled.metadata.shared,
        tensor_core=dict(sorted(Counter(re.findall(r"\b(v_mfma_\w+?)\s", text)).items())),
        loads=wide("load"),
        stores=wide("store"),
        shared_stores=len(re.findall(r"\bds_write", text)),
    )


def measure(key: str) -> Counts:
    """Counts of one ``name target``."""
    name, target = key.split(" ")
    compiled = compile_case(CASES[name], target)
    return count_amd(compiled) if target.startswith("gfx") else count_nvidia(compiled)


def keys() -> list[str]:
    """Every ``name target``."""
    return [f"{name} {target}" for name, case in CASES.items() for target in case.targets]


def measure_all(wanted: list[str]) -> dict[str, Counts]:
    """Counts of many, two at a time."""
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        return dict(zip(wanted, pool.map(measure, wanted), strict=True))


def read_table() -> tuple[str, dict[str, Counts]]:
    """Triton version and the stored counts."""
    stored = json.loads(TABLE.read_text())
    pairs = ("copies", "loads", "stores")
    rows = {
        key: Counts(**{name: tuple(value) if name in pairs else value for name, value in row.items()})
        for key, row in stored["kernels"].items()
    }
    return stored["triton"], rows


def main(arguments: list[str]) -> None:
    """See the module."""
    names = [a for a in arguments if not a.startswith("--")]
    wanted = [key for key in keys() if not names or any(re.search(n, key) for n in names)]
    rows = measure_all(wanted)
    for key, counts in rows.items():
        print(f"{key:44s}", *(f"{name}={value}" for name, value in vars(counts).items()))
    if "--write" in arguments:
        known = read_table()[1] if TABLE.exists() and names else {}
        lines = [f'    "{key}": {json.dumps(vars(counts))}' for key, counts in sorted({**known, **rows}.items())]
        body = ",\n".join(lines)
        TABLE.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n{body}\n  }}\n}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])
