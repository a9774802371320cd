"""What tests/kernels/aot.py compiles of the kernels that read an encoded cache, as :mod:`tests.kernels.aot_cases`."""

from __future__ import annotations

from typing import Any

import torch

from fxq.kernels.attention import triton_pack, triton_planes
from fxq.kernels.attention.eight_bits import int8, triton_int8, triton_int8_fp8
from fxq.kernels.attention.encoded import triton_stored
from fxq.kernels.attention.triton import attention_part_kernel, tile_of
from fxq.kernels.attention.triton_numbers import Stored
from fxq.kernels.cluster import triton as clusters

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

FLOAT8 = ("sm_89", "sm_90", "sm_100", "sm_120")

SIDES: dict[str, dict[str, object]] = {
    "dense": {"x": "*bf16"},
    "float8": {"x": "*u8", "scale": "*fp32", "TOKENS": 1560},
    "token-int8": {"x": "*u8", "scale": "*bf16", "BITS": 8, "OFFSET": 127, "CHANNELS": 32},
    "token-int2": {"x": "*u8", "scale": "*u8", "zero": "*u8", "BITS": 2, "CHANNELS": 16},
    "channel-int2": {"x": "*u8", "scale": "*bf16", "zero": "*bf16", "BITS": 2, "CHANNELS": 1, "TOKENS": 1560},
    "channel-int8": {"x": "*u8", "scale": "*bf16", "zero": "*bf16", "BITS": 8, "CHANNELS": 1, "TOKENS": 1560},
    "prq": {"x": "*u8", "scale": "*u8", "BITS": 2, "OFFSET": 1, "CHANNELS": 64, "STAGES": 1, "CENTROIDS": 256},
    "prq-4": {"x": "*u8", "scale": "*u8", "BITS": 2, "OFFSET": 1, "CHANNELS": 16, "STAGES": 4, "CENTROIDS": 256},
}
"""Fields of :class:`Stored` that differ from those of dense tokens."""


def side(name: str, size: int) -> Stored:
    """Types and constants of keys or values with heads of so many channels."""
    numbers = {"BITS": 0, "OFFSET": 0, "CHANNELS": size, "TOKENS": 1, "STAGES": 0, "CENTROIDS": 1, "ID_BITS": 8}
    absent = dict.fromkeys(("scale", "zero", "ids", "centroids"))
    own = SIDES[name] | ({"ids": "*u8", "centroids": "*bf16"} if "STAGES" in SIDES[name] else {})
    fields = dict.fromkeys(Stored._fields, "i32") | absent | numbers | own
    return Stored(**fields)


def attention(name: str, dtype: str = "bf16", first: bool = False) -> dict[str, Any]:
    """Arguments of a :class:`tests.kernels.aot_cases.Case` of attention to keys and values of a form, heads of 128."""
    both = side(name, 128)
    tile = tile_of(torch.float32 if dtype == "fp32" else torch.bfloat16, both.STAGES, name == "channel-int8")
    types = {"q_ptr": f"*{dtype}", "factor": "fp32", "k": both, "v": both}
    types |= dict.fromkeys(("cos_ptr", "sin_ptr", "out_ptr", "lse_ptr"), "*fp32")
    rotate = name != "dense"
    constants = {"SIZE": 128, "D": 128, "ROTATE": rotate, "FIRST": first, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    constants |= {} if rotate else {"cos_ptr": None, "sin_ptr": None}
    options = {"warps": tile.warps, "stages": tile.stages, "targets": TARGETS}
    return {"kernel": attention_part_kernel, "types": types, "constants": constants, **options}


def integers(dtype: str = "bf16", first: bool = False) -> dict[str, Any]:
    """Arguments of a case of attention in 8-bit integers, heads of 128."""
    tile = triton_int8.tile_of(torch.float32 if dtype == "fp32" else torch.bfloat16)
    types = {"q_ptr": "*i8", "k_ptr": "*i8", "v_ptr": f"*{dtype}"}
    types |= dict.fromkeys(("q_scale_ptr", "bias_ptr", "k_scale_ptr", "out_ptr", "lse_ptr"), "*fp32")
    constants = {"SIZE": 128, "D": 128, "FIRST": first, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    options = {"warps": tile.warps, "stages": tile.stages, "targets": TARGETS}
    return {"kernel": triton_int8.attention_int8_kernel, "types": types, "constants": constants, **options}


def stored_integers(arch: int, dtype: str = "bf16", first: bool = False) -> dict[str, Any]:
    """Arguments of a case of attention to stored integers, heads of 128, by an architecture."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    tile = triton_stored.tile_of(kind, arch)
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*i8")
    floats = ("q_scale_ptr", "bias_ptr", "k_scale_ptr", "v_scale_ptr", "out_ptr", "lse_ptr")
    constants = {"SIZE": 128, "D": 128, "VALUES": int8.VALUE_BLOCK, "TYPE": triton_stored.type_of(kind)}
    constants |= {"FIRST": first, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    targets = tuple(t for t in TARGETS if triton_stored.tile_of(kind, int(t[3:])) == tile)
    options = {"warps": tile.warps, "stages": tile.stages, "targets": targets}
    kernel = triton_stored.attention_stored_kernel
    return {"kernel": kernel, "types": types | dict.fromkeys(floats, "*fp32"), "constants": constants, **options}


def float8_values(arch: int, first: bool = False) -> dict[str, Any]:
    """Arguments of a case of attention with float8 weights and values, heads of 128, by an architecture."""
    tile = triton_int8_fp8.tile_of(arch)
    types = {"q_ptr": "*i8", "k_ptr": "*i8", "v_ptr": "*fp8e4nv"}
    floats = ("q_scale_ptr", "bias_ptr", "k_scale_ptr", "v_scale_ptr", "out_ptr", "lse_ptr")
    constants = {"SIZE": 128, "D": 128, "FIRST": first, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    targets = tuple(t for t in FLOAT8 if triton_int8_fp8.tile_of(int(t[3:])) == tile)
    options = {"warps": tile.warps, "stages": tile.stages, "targets": targets}
    kernel = triton_int8_fp8.attention_int8_fp8_kernel
    return {"kernel": kernel, "types": types | dict.fromkeys(floats, "*fp32"), "constants": constants, **options}


def codes_of_values(dtype: str) -> dict[str, Any]:
    """Arguments of a case of the float8 codes of values, heads of 128."""
    types = {"v_ptr": f"*{dtype}", "scale_ptr": "*fp32", "code_ptr": "*fp8e4nv"}
    constants = {"SIZE": 128, "D": 128, "BLOCK": triton_int8_fp8.KEYS}
    return {
        **_of(triton_int8_fp8.values_kernel, types),
        "constants": constants,
        "warps": 4,
        "stages": 3,
        "targets": FLOAT8,
    }


def codes(dtype: str, mean: bool) -> dict[str, Any]:
    """Arguments of a case of the codes of queries, or of keys less their mean, heads of 128."""
    types = {"x_ptr": f"*{dtype}", "code_ptr": "*i8", "mean_ptr": "*fp32", "scale_ptr": "*fp32", "least": "fp32"}
    constants: dict[str, Any] = {"SIZE": 128, "D": 128, "BLOCK": triton_int8.CODE_ROWS}
    constants |= {} if mean else {"mean_ptr": None}
    return {**_of(triton_int8.codes_kernel, types), "constants": constants, "warps": 4, "stages": 3}


def planes() -> dict[str, Any]:
    """Arguments of a case of the decoding of bit planes."""
    types = dict.fromkeys(("step_ptr", "basis_ptr", "mean_ptr", "y_ptr"), "*bf16")
    types |= {"planes_ptr": "*u8", "width_ptr": "*u8", "first_ptr": "*i32"}
    constants = {"SHARED": False, "BLOCK_T": triton_planes.BLOCK_T, "BLOCK_R": triton_planes.BLOCK_R}
    constants["BLOCK_C"] = triton_planes.BLOCK_C
    options = {"warps": 8, "stages": 1, "targets": TARGETS}
    return {"kernel": triton_planes.planes_kernel, "types": types, "constants": constants, **options}


def cluster(kernel: str) -> dict[str, Any]:
    """Arguments of a case of one half of k-means."""
    types = dict.fromkeys(("x_ptr", "centroids_ptr", "y_ptr"), "*fp32")
    types |= dict.fromkeys(("names_ptr", "order_ptr", "ends_ptr"), "*i64")
    if kernel == "nearest":
        blocks = {"BLOCK_T": clusters.BLOCK_T, "BLOCK_C": clusters.BLOCK_C, "BLOCK_D": clusters.BLOCK_D}
        return {**_of(clusters.nearest_kernel, types), "constants": blocks, "warps": 8, "stages": 2}
    blocks = {"BLOCK_T": clusters.MEAN_T, "BLOCK_D": clusters.MEAN_D}
    return {**_of(clusters.means_kernel, types), "constants": blocks, "warps": 4, "stages": 3}


def pack(bits: int, scale: str, asymmetric: bool) -> dict[str, Any]:
    """Arguments of a case of the packing of blocks of 16 channels."""
    types = {"x_ptr": "*fp32", "scale_ptr": scale, "zero_ptr": scale, "y_ptr": "*u8"}
    constants: dict[str, Any] = {"SIZE": 128, "D": 128, "CHANNELS": 16, "BITS": bits, "ROWS": triton_pack.ROWS}
    constants |= {} if asymmetric else {"zero_ptr": None}
    return {**_of(triton_pack.pack_kernel, types), "constants": constants, "warps": 4, "stages": 3}


def _of(kernel: Any, types: dict[str, str]) -> dict[str, Any]:
    own = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    return {"kernel": kernel, "types": own, "targets": TARGETS}


CASES = {f"attention-part-{name}": attention(name, first=name == "dense") for name in SIDES}
CASES |= {f"attention-part-float32-{name}": attention(name, "fp32") for name in ("prq", "token-int8", "channel-int2")}
CASES |= {"attention-int8-first": integers(first=True), "attention-int8": integers()}
CASES |= {f"attention-int8-{dtype}": integers(dtype) for dtype in ("fp16", "fp32")}
CASES |= {"attention-stored-first": stored_integers(90, first=True), "attention-stored": stored_integers(90)}
CASES |= {f"attention-stored-{dtype}": stored_integers(90, dtype) for dtype in ("fp16", "fp32")}
CASES |= {
    "attention-stored-64-rows": stored_integers(100),
    "attention-stored-64-rows-fp16": stored_integers(100, "fp16"),
}
CASES |= {"attention-fp8-first": float8_values(90, first=True), "attention-fp8": float8_values(90)}
CASES |= {"attention-fp8-64-rows-first": float8_values(120, first=True), "attention-fp8-64-rows": float8_values(120)}
CASES |= {f"attention-fp8-values-{dtype}": codes_of_values(dtype) for dtype in ("bf16", "fp32")}
CASES |= {"attention-codes": codes("bf16", False), "attention-codes-mean": codes("bf16", True)}
CASES["planes"] = planes()
CASES |= {"pack-int2": pack(2, "*u8", False), "pack-zeros": pack(4, "*bf16", True)}
CASES |= {f"cluster-{half}": cluster(half) for half in ("nearest", "means")}
"""Name -> arguments of a case."""
