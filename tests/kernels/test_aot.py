"""The shipped kernels and tiles, compiled for GPUs that need not be there, and their machine code."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fxq.kernels import gemm, quantize
from fxq.kernels.tiles import TABLE, Tiles, candidates

triton = pytest.importorskip("triton", reason="Triton is not installed")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET replaces the compiler"),
    pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="this Triton has no NVIDIA compiler"),
]

TYPES = {
    **dict.fromkeys(("q_ptr", "w_ptr"), "*i8"),
    **dict.fromkeys(("weight_scale_ptr", "input_scale_ptr", "offset_ptr", "scale_ptr"), "*fp32"),
    **dict.fromkeys(("perm_ptr", "zero_ptr"), "*i32"),
    **dict.fromkeys(("x_ptr", "y_ptr"), "*bf16"),
}
TENSOR_CORE = {80: "IMMA", 86: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA", 120: "IMMA"}


def compile_kernel(kernel: Any, arch: int, warps: int, stages: int, types: dict[str, str], **constants: object) -> Any:
    """Compile as a launch does whose pointers and sizes, but for M, are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else (TYPES | types).get(name, "i32") for name in names}
    divisible = [["tt.divisibility", 16]]
    aligned = {(i,): divisible for i, name in enumerate(names) if name not in constants and name != "M"}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_linear(tiles: Tiles, arch: int, dual: bool, packed: bool) -> Any:
    return compile_kernel(
        gemm.linear_kernel,
        arch,
        tiles.warps,
        tiles.stages,
        {"w_ptr": "*u8"} if packed else {},
        DUAL=dual,
        PACKED=packed,
        PTX=True,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        BLOCK_OUTLIER=tiles.block_outlier,
        GROUP_M=tiles.group_m,
    )


def machine_code(compiled: Any, folder: Path) -> list[str]:
    """Opcodes of the compiled kernel."""
    disassembler = TOOLS / "nvdisasm"
    if not disassembler.exists():
        pytest.skip("this Triton has no nvdisasm")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)


def spills(opcodes: list[str]) -> int:
    return sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes)


def check_linear(tiles: Tiles, arch: int, dual: bool, packed: bool, folder: Path) -> None:
    compiled = compile_linear(tiles, arch, dual, packed)
    opcodes = machine_code(compiled, folder)
    copies = [opcode for opcode in opcodes if opcode.startswith("LDGSTS")]
    assert spills(opcodes) == 0
    tensor_core = TENSOR_CORE[arch] if tiles.block_m >= 64 else "IMMA"  # a warp group multiplies at least 64 rows
    assert any(opcode.startswith(tensor_core) for opcode in opcodes)
    wide = (".128",) if tiles.block_m >= 64 else (".128", ".64")  # a small tile has fewer bytes per thread
    assert copies and all(copy.endswith(wide) for copy in copies)
    assert compiled.metadata.shared <= (99 if arch in (86, 89, 120) else 163) * 1024


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("packed", [False, True], ids=["w8", "w4"])
def test_dual_scale_kernel_keeps_its_accumulator_in_registers(arch: int, packed: bool, tmp_path: Path) -> None:
    check_linear(TABLE[1], arch, True, packed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(TENSOR_CORE))
@pytest.mark.parametrize("packed", [False, True], ids=["w8", "w4"])
@pytest.mark.parametrize("dual", [False, True], ids=["single", "dual"])
@pytest.mark.parametrize("tiles", TABLE, ids=lambda t: f"{t.block_m}x{t.block_n}x{t.block_k}")
def test_every_shipped_tile_compiles_without_spills(
    tiles: Tiles, dual: bool, packed: bool, arch: int, tmp_path: Path
) -> None:
    if tiles in candidates(arch):
        check_linear(tiles, arch, dual, packed, tmp_path)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("gather", [False, True], ids=["in-order", "gather"])
def test_quantize_kernel_compiles_without_spills(gather: bool, arch: int, tmp_path: Path) -> None:
    constants = dict(LOW=-128, HIGH=127, GATHER=gather, DUAL=True, BLOCK_M=16, BLOCK_K=256)
    opcodes = machine_code(
        compile_kernel(quantize.quantize_kernel, arch, 4, 3, {"q_ptr": "*i8"}, **constants), tmp_path
    )
    assert spills(opcodes) == 0
    assert gather or any(re.match(r"LDG\.\S*128", opcode) for opcode in opcodes)
