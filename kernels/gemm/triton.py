"""Launches of the Triton GEMM: ``dual_scale_linear`` and the operators fused with it on "cuda"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels.arguments import DualScaleLinearAdd, DualScaleLinearQuantize, Operands
from fxq.kernels.gemm.activations import ACTIVATIONS
from fxq.kernels.gemm.tiles import Tiles, choose
from fxq.kernels.gemm.triton_kernel import linear_kernel
from fxq.kernels.jit import triton
from fxq.kernels.rows import flat_rows


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What follows the product inside the kernel.

    Attributes:
        operation: what :func:`fxq.kernels.gemm.tiles.candidates` asks for.
        arguments: the kernel's own for it.
    """

    operation: str
    arguments: dict[str, object]


STORE = Epilogue(
    "store",
    {
        **dict.fromkeys(("out_scale_ptr", "out_zero_ptr", "residual_ptr", "gate_ptr", "ACTIVATION")),
        **dict.fromkeys(("out_split", "residual_stride", "gate_stride", "frame_rows"), 0),
        **{"EPILOGUE": "store", "OUT_DUAL": False, "LOW": 0, "HIGH": 0, "GATED": False},
    },
)
"""The product is stored as it is; the other epilogues replace some of these."""


def quantizing(a: DualScaleLinearQuantize) -> Epilogue:
    """Activation and the quantization of the next layer."""
    low, high = numerics.integer_range(a.out_bits)
    own = {
        "EPILOGUE": "quantize",
        "out_scale_ptr": a.out_scale.contiguous(),
        "out_zero_ptr": a.out_zero_point.contiguous(),
        "out_split": a.out_split,
        "ACTIVATION": ACTIVATIONS[a.activation].triton,
        "OUT_DUAL": a.out_split < a.operands.outputs,
        "LOW": low,
        "HIGH": high,
    }
    return Epilogue(a.activation, STORE.arguments | own)


def adding(a: DualScaleLinearAdd) -> Epilogue:
    """Gate and residual."""
    residual = flat_rows(a.residual)
    own: dict[str, object] = {
        "EPILOGUE": "add",
        "residual_ptr": residual,
        "residual_stride": residual.stride(0),
    }
    if a.gate is not None:
        gate = flat_rows(a.gate)
        own |= {"gate_ptr": gate, "gate_stride": gate.stride(0), "GATED": True}
        own |= {"frame_rows": max(1, residual.shape[0] // gate.shape[0])}
    return Epilogue("add", STORE.arguments | own)


def launch(a: Operands, out: Tensor, *, tiles: Tiles, epilogue: Epilogue = STORE) -> Tensor:
    """Run the Triton kernel on the current device.

    Args:
        a: of the product, int8 or float8.
        out: contiguous [..., N], filled and returned.
        tiles: of the programs.
        epilogue: what follows the product.

    Raises:
        ValueError: when the weight is laid out for the CPU kernel.
    """
    rows, weight = flat_rows(a.q), weight_rows(a)
    if out.numel():
        grid = (triton.cdiv(rows.shape[0], tiles.block_m) * triton.cdiv(a.outputs, tiles.block_n),)
        linear_kernel[grid](
            rows,
            weight,
            a.weight_scale.contiguous(),
            a.input_scale.contiguous(),
            a.offset.contiguous(),
            out,
            M=rows.shape[0],
            N=a.outputs,
            q_stride=rows.stride(0),
            w_stride=weight.stride(0),
            w_width=weight.shape[1],
            w_split=a.split // 2 if a.packed else a.split,
            DUAL=a.split < a.width,
            PACKED=a.packed,
            PTX=rows.is_cuda,
            **tiles.constants(),
            **epilogue.arguments,
        )
    return out


def weight_rows(a: Operands) -> Tensor:
    """The weight, with contiguous rows.

    Raises:
        ValueError: when it is laid out for the CPU kernel.
    """
    if a.weight.ndim != 2:
        raise ValueError(
            f"weight is {tuple(a.weight.shape)}, panels for the CPU kernel: expected [N, K] on {a.q.device.type};"
            " lay the weights out on the device that runs them"
        )
    return a.weight if a.weight.stride(1) == 1 else a.weight.contiguous()


def launch_tiled(a: Operands, out: Tensor, epilogue: Epilogue = STORE) -> Tensor:
    """:func:`launch` on the device that holds q, with the tiles of its architecture."""
    with torch.cuda.device(a.q.device):
        major, minor = torch.cuda.get_device_capability()
        rows = out.numel() // max(1, a.outputs)
        tiles = choose(rows, a.outputs, a.width, 10 * major + minor, packed=a.packed, operation=epilogue.operation)
        return launch(a, out, tiles=tiles, epilogue=epilogue)
