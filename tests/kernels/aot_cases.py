"""What tests/kernels/aot.py compiles: the shipped kernels with the types and constants of real launches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fxq.kernels.gemm import gluon as gluon_gemm
from fxq.kernels.gemm.activations import ACTIVATIONS
from fxq.kernels.gemm.tiles import TABLE, TWO_SUMS, Tiles, candidates
from fxq.kernels.gemm.triton import STORE
from fxq.kernels.gemm.triton_fp8 import quantize_fp8_kernel, quantize_fp8_per_token_kernel
from fxq.kernels.gemm.triton_kernel import linear_kernel
from fxq.kernels.gemm.triton_per_token import ADDS, SUMS_BLOCK, linear_per_token_kernel, weight_sums_kernel
from fxq.kernels.norm.triton import norm_quantize_kernel
from fxq.kernels.norm.triton_per_token import norm_quantize_per_token_kernel
from fxq.kernels.quantize.op import BLOCKS, quantize_kernel
from fxq.kernels.quantize.triton_per_token import block_of, quantize_per_token_kernel
from fxq.kernels.rope.triton import rms_norm_rope_kernel
from fxq.kernels.rows import warps_of
from tests.kernels import aot_cache

ALL = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
FP8 = ("sm_89", "sm_90", "sm_100", "sm_120")
INT8 = {"LOW": -128, "HIGH": 127}


@dataclass(frozen=True)
class Case:
    """One kernel with its compile-time arguments.

    Attributes:
        kernel: the Triton or Gluon function.
        types: argument -> Triton's name of its type, int32 where absent; of a tuple one of such names and of constants.
        constants: compile-time arguments.
        warps: per program.
        stages: of the software pipeline.
        targets: what it is compiled for.
    """

    kernel: Any
    types: dict[str, Any]
    constants: dict[str, object]
    warps: int
    stages: int
    targets: tuple[str, ...] = ALL


LINEAR_TYPES = {
    **dict.fromkeys(("q_ptr", "w_ptr"), "*i8"),
    **dict.fromkeys(("weight_scale_ptr", "input_scale_ptr", "offset_ptr", "out_scale_ptr"), "*fp32"),
    **dict.fromkeys(("y_ptr", "residual_ptr", "gate_ptr"), "*bf16"),
    "out_zero_ptr": "*i32",
}
STORED = {
    "w8": {},
    "w4": {"w_ptr": "*u8"},
    "fp8": dict.fromkeys(("q_ptr", "w_ptr"), "*fp8e4nv"),
}
FUNCTIONS = [name for name, a in ACTIVATIONS.items() if name != "none" and a.triton is not None]
EPILOGUES: dict[str, dict[str, object]] = {
    "store": {},
    **{
        name: {"EPILOGUE": "quantize", "ACTIVATION": ACTIVATIONS[name].triton, "OUT_DUAL": True, **INT8}
        for name in FUNCTIONS
    },
    "add": {"EPILOGUE": "add", "GATED": True},
}
PASSED = {
    "store": (),
    **dict.fromkeys(FUNCTIONS, ("out_scale_ptr", "out_zero_ptr", "out_split")),
    "add": ("residual_ptr", "gate_ptr", "residual_stride", "gate_stride", "frame_rows"),
}


def linear(tiles: Tiles, weight: str = "w8", epilogue: str = "store", dual: bool = True) -> Case:
    """A case of the GEMM; weight is "w8", "w4" or "fp8". It is compiled where a launch may choose these tiles."""
    types = LINEAR_TYPES | STORED[weight] | ({"y_ptr": "*i8"} if "ACTIVATION" in EPILOGUES[epilogue] else {})
    constants = STORE.arguments | tiles.constants() | EPILOGUES[epilogue] | {"DUAL": dual, "PACKED": weight == "w4"}
    for name in ("num_warps", "num_stages", *PASSED[epilogue]):
        del constants[name]
    plain = replace(tiles, swapped=False)
    targets = (
        t for t in (FP8 if weight == "fp8" else ALL) if t == "gfx942" or plain in candidates(int(t[3:]), epilogue)
    )
    return Case(linear_kernel, types, constants, tiles.warps, tiles.stages, tuple(targets))


def linear_per_token(
    tiles: Tiles, weight: str = "w8", dual: bool = True, asymmetric: bool = False, added: bool = False
) -> Case:
    """A case of the GEMM with scales per token, compiled where a launch may choose these tiles."""
    own = ("q_ptr", "w_ptr", "weight_scale_ptr", "input_scale_ptr", "offset_ptr", "y_ptr")
    own += ("residual_ptr", "gate_ptr") if added else ()
    types = {name: kind for name, kind in (LINEAR_TYPES | STORED[weight]).items() if name in own}
    constants = tiles.constants() | {"DUAL": dual, "PACKED": weight == "w4", "ASYMMETRIC": asymmetric}
    constants |= {"ADDED": added, "GATED": added}
    constants |= {} if added else {name: STORE.arguments[name] for name in ADDS}
    if asymmetric:
        types["sums_ptr"] = "*i32"
    else:
        constants["sums_ptr"] = None
    for name in ("num_warps", "num_stages"):
        del constants[name]
    single = "asymmetric" if asymmetric else "fp8_per_token" if weight == "fp8" else "per_token"
    plain = replace(tiles, swapped=False)
    operation = ("per_token_dual" if dual else single) + ("_add" if added else "")
    known = FP8 if weight == "fp8" else ALL
    targets = (t for t in known if plain in candidates(90 if t == "gfx942" else int(t[3:]), operation))
    return Case(linear_per_token_kernel, types, constants, tiles.warps, tiles.stages, tuple(targets))


def weight_sums(packed: bool) -> Case:
    """A case of the sums that the GEMM needs where rows have zero points."""
    constants = {"PACKED": packed, "BLOCK_N": SUMS_BLOCK[0], "BLOCK_K": SUMS_BLOCK[1]}
    return Case(weight_sums_kernel, {"w_ptr": "*u8" if packed else "*i8", "sums_ptr": "*i32"}, constants, 4, 3)


def quantize_per_token(width: int, gather: bool, asymmetric: bool = False, activation: str = "none") -> Case:
    """A case of quantize_per_token, or of quantize_per_token_asymmetric."""
    block = block_of(width)
    types = {"x_ptr": "*bf16", "perm_ptr": "*i32", "q_ptr": "*i8", "scale_ptr": "*fp32", "least": "fp32"}
    constants: dict[str, object] = {"GATHER": gather, "DUAL": True, "WHOLE": width <= block, "BLOCK": block}
    constants |= {"LOW": -128 if asymmetric else -127, "HIGH": 127, "ASYMMETRIC": asymmetric}
    constants |= {} if gather else {"perm_ptr": None}
    constants |= {"ACTIVATION": None if activation == "none" else ACTIVATIONS[activation].triton}
    return Case(quantize_per_token_kernel, types, constants, warps_of(block), 3)


def norm(width: int, gather: bool, affine: bool = False) -> Case:
    """A case of norm_quantize with modulation."""
    block = 1 << (width - 1).bit_length()
    types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "gain_ptr", "shift_ptr"), "*bf16")
    types |= {"perm_ptr": "*i32", "scale_ptr": "*fp32", "zero_ptr": "*i32", "q_ptr": "*i8", "eps": "fp32"}
    constants: dict[str, object] = {"WEIGHT": affine, "BIAS": affine, "MODULATED": True, "GATHER": gather, "DUAL": True}
    constants |= {"BLOCK": block, **INT8}
    unused = ([] if affine else ["weight_ptr", "bias_ptr"]) + ([] if gather else ["perm_ptr"])
    return Case(norm_quantize_kernel, types, constants | dict.fromkeys(unused), warps_of(block), 3)


def norm_per_token(width: int, gather: bool, affine: bool = False, asymmetric: bool = False) -> Case:
    """A case of norm_quantize_per_token, or of norm_quantize_per_token_asymmetric, with modulation."""
    static, own = norm(width, gather, affine), quantize_per_token(width, gather, asymmetric)
    types = static.types | {"least": "fp32"}
    constants = static.constants | {name: own.constants[name] for name in ("LOW", "HIGH", "ASYMMETRIC")}
    return replace(static, kernel=norm_quantize_per_token_kernel, types=types, constants=constants)


def rope(width: int, head_dim: int) -> Case:
    """A case of rms_norm_rope with both halves."""
    block = 1 << (width - 1).bit_length()
    types = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), "*bf16")
    types |= dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32") | {"eps": "fp32"}
    constants = {"HALF": head_dim // 2, "NORM": True, "ROTATE": True, "BLOCK": block}
    return Case(rms_norm_rope_kernel, types, constants, warps_of(block), 3)


def quantize(gather: bool) -> Case:
    """A case of quantize_act."""
    types = {"x_ptr": "*bf16", "perm_ptr": "*i32", "scale_ptr": "*fp32", "zero_ptr": "*i32", "q_ptr": "*i8"}
    constants = {"GATHER": gather, "DUAL": True, "BLOCK_M": BLOCKS[0], "BLOCK_K": BLOCKS[1], **INT8}
    return Case(quantize_kernel, types, constants, 4, 3)


def quantize_fp8() -> Case:
    """A case of quantize_fp8."""
    types = {"x_ptr": "*bf16", "perm_ptr": "*i32", "scale_ptr": "*fp32", "q_ptr": "*fp8e4nv"}
    return Case(quantize_fp8_kernel, types, {"GATHER": True, "DUAL": True, "BLOCK": 2048}, warps_of(2048), 3, FP8)


def quantize_fp8_per_token() -> Case:
    """A case of quantize_fp8_per_token, without the gather that layers of one scale do not need."""
    types = {"x_ptr": "*bf16", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "least": "fp32"}
    constants: dict[str, object] = {"GATHER": False, "DUAL": False, "BLOCK": 2048, "perm_ptr": None}
    return Case(quantize_fp8_per_token_kernel, types, constants, warps_of(2048), 3, FP8)


def gluon(tiles: gluon_gemm.GluonTiles) -> Case:
    """A case of the Gluon GEMM."""
    types = dict.fromkeys(("weight_scale_ptr", "input_scale_ptr", "offset_ptr"), "*fp32")
    types |= {"q_ptr": "*i8", "y_ptr": "*bf16"}
    for operand, rows in (("q", tiles.block_m), ("w", tiles.block_n)):
        layout = gluon_gemm.gl.NVMMASharedLayout.get_default_for([rows, tiles.block_k], gluon_gemm.gl.int8)
        descriptor = f"tensordesc<i8[{rows}, {tiles.block_k}],{layout!r}>"
        types |= {f"{operand}_normal": descriptor, f"{operand}_outlier": descriptor}
    constants = gluon_gemm.constants(tiles, dual=True)
    return Case(gluon_gemm.gluon_kernel, types, constants, tiles.warps, 3, ("sm_90",))


def label(tiles: Tiles | gluon_gemm.GluonTiles) -> str:
    """As 128x256x64."""
    return f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}"


def linears() -> dict[str, Case]:
    """Name -> case of the GEMM."""
    cases = {}
    for i, tiles in enumerate(TABLE):
        size, swapped = label(tiles), replace(tiles, swapped=True)
        cases[f"linear-w8-store-{size}"] = linear(tiles)
        cases[f"linear-w4-store-{size}"] = linear(swapped, "w4")
        cases[f"linear-per-token-w8-single-{size}"] = linear_per_token(tiles, dual=False)
        cases[f"linear-per-token-w4-single-{size}"] = linear_per_token(swapped, "w4", dual=False)
        if i in (1, 2, len(TABLE) - 1):
            cases[f"linear-asymmetric-w8-single-{size}"] = linear_per_token(tiles, dual=False, asymmetric=True)
            cases[f"linear-asymmetric-w4-single-{size}"] = linear_per_token(swapped, "w4", dual=False, asymmetric=True)
            cases[f"linear-per-token-w8-single-add-{size}"] = linear_per_token(tiles, dual=False, added=True)
            cases[f"linear-per-token-w4-single-add-{size}"] = linear_per_token(swapped, "w4", dual=False, added=True)
        if i == 1:
            cases[f"linear-asymmetric-w8-single-add-{size}"] = linear_per_token(tiles, "w8", False, True, added=True)
            cases[f"linear-asymmetric-w4-single-add-{size}"] = linear_per_token(swapped, "w4", False, True, added=True)
        if i in (0, 1, len(TABLE) - 1):
            cases[f"linear-fp8-store-{size}"] = linear(tiles, "fp8")
            cases[f"linear-fp8-per-token-single-{size}"] = linear_per_token(tiles, "fp8", dual=False)
        if i < 2:
            cases[f"linear-w8-single-{size}"] = linear(tiles, dual=False)
        for name in FUNCTIONS:
            # The usual activation with every tile, the others where there is least room beside the sums.
            if name == "gelu_tanh" or i < 3:
                cases[f"linear-w8-{name}-{size}"] = linear(tiles, epilogue=name)
            if i < (2 if name == "gelu_tanh" else 1):
                cases[f"linear-w4-{name}-{size}"] = linear(swapped, "w4", name)
        if i < 3:
            cases[f"linear-w8-add-{size}"] = linear(tiles, epilogue="add")
            cases[f"linear-w4-add-{size}"] = linear(swapped, "w4", "add")
    for tiles in TWO_SUMS:
        cases[f"linear-per-token-w8-dual-{label(tiles)}"] = linear_per_token(tiles)
        cases[f"linear-per-token-w4-dual-{label(tiles)}"] = linear_per_token(replace(tiles, swapped=True), "w4")
    for tiles in TWO_SUMS[:2]:
        swapped = replace(tiles, swapped=True)
        cases[f"linear-asymmetric-w8-dual-{label(tiles)}"] = linear_per_token(tiles, asymmetric=True)
        cases[f"linear-asymmetric-w8-dual-add-{label(tiles)}"] = linear_per_token(tiles, asymmetric=True, added=True)
        cases[f"linear-asymmetric-w4-dual-add-{label(tiles)}"] = linear_per_token(
            swapped, "w4", asymmetric=True, added=True
        )
        cases[f"linear-per-token-w8-dual-add-{label(tiles)}"] = linear_per_token(tiles, added=True)
        cases[f"linear-per-token-w4-dual-add-{label(tiles)}"] = linear_per_token(swapped, "w4", added=True)
        cases[f"linear-asymmetric-w4-dual-{label(tiles)}"] = linear_per_token(swapped, "w4", asymmetric=True)
    return cases


CASES = linears() | {
    **{f"gluon-{label(tiles)}": gluon(tiles) for tiles in gluon_gemm.TABLE if gluon_gemm.HAS_GLUON},
    "norm-1536": norm(1536, gather=False),
    "norm-gather-1536": norm(1536, gather=True),
    "norm-gather-affine-5120": norm(5120, gather=True, affine=True),
    "norm-per-token-1536": norm_per_token(1536, gather=False),
    "norm-per-token-gather-1536": norm_per_token(1536, gather=True),
    "norm-per-token-gather-affine-5120": norm_per_token(5120, gather=True, affine=True),
    "norm-asymmetric-gather-1536": norm_per_token(1536, gather=True, asymmetric=True),
    "norm-asymmetric-gather-affine-5120": norm_per_token(5120, gather=True, affine=True, asymmetric=True),
    "rope-1536": rope(1536, 128),
    "rope-5120": rope(5120, 128),
    "quantize": quantize(gather=False),
    "quantize-gather": quantize(gather=True),
    "quantize-fp8-gather": quantize_fp8(),
    "quantize-fp8-per-token": quantize_fp8_per_token(),
    "quantize-per-token-1536": quantize_per_token(1536, gather=False),
    "quantize-per-token-gather-1536": quantize_per_token(1536, gather=True),
    "quantize-per-token-gather-8960": quantize_per_token(8960, gather=True),
    "quantize-per-token-gather-20480": quantize_per_token(20480, gather=True),
    "quantize-per-token-gelu_tanh-8960": quantize_per_token(8960, gather=False, activation="gelu_tanh"),
    "quantize-asymmetric-gelu-gather-8960": quantize_per_token(8960, gather=True, asymmetric=True, activation="gelu"),
    "quantize-asymmetric-1536": quantize_per_token(1536, gather=False, asymmetric=True),
    "quantize-asymmetric-gather-8960": quantize_per_token(8960, gather=True, asymmetric=True),
    "quantize-asymmetric-gather-20480": quantize_per_token(20480, gather=True, asymmetric=True),
    "weight-sums-w8": weight_sums(packed=False),
    "weight-sums-w4": weight_sums(packed=True),
    **{name: Case(**arguments) for name, arguments in aot_cache.CASES.items()},
}
"""Name -> case of everything that ships; the largest tile first, so that a pool of processes ends evenly."""
