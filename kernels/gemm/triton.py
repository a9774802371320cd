"""Launches of the Triton GEMM: ``dual_scale_linear`` and the operators fused with it on "cuda"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels.gemm.tiles import Tiles, choose
from fxq.kernels.gemm.triton_kernel import linear_kernel
from fxq.kernels.jit import triton
from fxq.kernels.rows import flat_rows


@dataclass(frozen=True, eq=False)
class Store:
    """The product is stored as it is."""

    kind = "store"

    @property
    def operation(self) -> str:
        """What :func:`fxq.kernels.gemm.tiles.candidates` asks for."""
        return self.kind

    def arguments(self, outputs: int) -> dict[str, object]:
        """Kernel arguments of a product with so many output channels."""
        pointers = dict.fromkeys(("out_scale_ptr", "out_zero_ptr", "residual_ptr", "gate_ptr"))
        sizes = dict.fromkeys(("out_split", "residual_stride", "gate_stride", "frame_rows"), 0)
        flags = {"ACTIVATION": "none", "OUT_DUAL": False, "LOW": 0, "HIGH": 0, "GATED": False}
        return {**pointers, **sizes, **flags, "EPILOGUE": self.kind}


@dataclass(frozen=True, eq=False)
class Quantize(Store):
    """Activation and the quantization of the next layer; see dual_scale_linear_quantize."""

    activation: str
    scale: Tensor
    zero_point: Tensor
    split: int
    bits: int
    kind = "quantize"

    @property
    def operation(self) -> str:
        """As there."""
        return self.activation

    def arguments(self, outputs: int) -> dict[str, object]:
        """As there."""
        low, high = numerics.integer_range(self.bits)
        return super().arguments(outputs) | {
            "out_scale_ptr": self.scale.contiguous(),
            "out_zero_ptr": self.zero_point.contiguous(),
            "out_split": self.split,
            "ACTIVATION": self.activation,
            "OUT_DUAL": self.split < outputs,
            "LOW": low,
            "HIGH": high,
        }


@dataclass(frozen=True, eq=False)
class Add(Store):
    """``residual + gate * y``; see dual_scale_linear_add."""

    residual: Tensor
    gate: Tensor | None
    kind = "add"

    def arguments(self, outputs: int) -> dict[str, object]:
        """As there."""
        residual = flat_rows(self.residual)
        arguments = {"residual_ptr": residual, "residual_stride": residual.stride(0)}
        if self.gate is not None:
            gate = flat_rows(self.gate)
            arguments |= {"gate_ptr": gate, "gate_stride": gate.stride(0), "GATED": True}
            arguments |= {"frame_rows": max(1, residual.shape[0] // gate.shape[0])}
        return super().arguments(outputs) | arguments


def launch(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    out: Tensor,
    *,
    tiles: Tiles,
    epilogue: Store | None = None,
) -> Tensor:
    """Run the Triton kernel on the current device.

    Args:
        q: as all up to ``split``, see :func:`fxq.kernels.gemm.op.dual_scale_linear`, or for float8
            :func:`fxq.kernels.gemm.fp8.dual_scale_linear_fp8`.
        weight: as there.
        weight_scale: as there.
        input_scale: as there.
        offset: as there.
        split: as there.
        out: contiguous [..., N], filled and returned.
        tiles: of the programs.
        epilogue: what follows the product; :class:`Store` by default.

    Raises:
        ValueError: when the weight is laid out for the CPU kernel.
    """
    if weight.ndim != 2:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, panels for the CPU kernel: expected [N, K] on {q.device.type};"
            " lay the weights out on the device that runs them"
        )
    width, outputs = q.shape[-1], weight.shape[0]
    rows = flat_rows(q)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    if out.numel():
        packed = weight.dtype == torch.uint8
        grid = (triton.cdiv(rows.shape[0], tiles.block_m) * triton.cdiv(outputs, tiles.block_n),)
        linear_kernel[grid](
            rows,
            weight,
            weight_scale.contiguous(),
            input_scale.contiguous(),
            offset.contiguous(),
            out,
            M=rows.shape[0],
            N=outputs,
            q_stride=rows.stride(0),
            w_stride=weight.stride(0),
            w_width=weight.shape[1],
            w_split=split // 2 if packed else split,
            DUAL=split < width,
            PACKED=packed,
            PTX=q.is_cuda,
            **tiles.constants(),
            **(epilogue or Store()).arguments(outputs),
        )
    return out


def launch_tiled(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    out: Tensor,
    epilogue: Store | None = None,
) -> Tensor:
    """:func:`launch` on the device that holds q, with the tiles of its architecture."""
    epilogue = epilogue or Store()
    with torch.cuda.device(q.device):
        major, minor = torch.cuda.get_device_capability()
        rows = out.numel() // max(1, out.shape[-1])
        packed = weight.dtype == torch.uint8
        tiles = choose(
            rows, out.shape[-1], q.shape[-1], 10 * major + minor, packed=packed, operation=epilogue.operation
        )
        return launch(q, weight, weight_scale, input_scale, offset, split, out, tiles=tiles, epilogue=epilogue)


def launch_chosen(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`launch_tiled` into a new tensor of this dtype; the weight's own dtype says whether it is packed."""
    out = q.new_empty((*q.shape[:-1], offset.shape[0]), dtype=dtype)
    return launch_tiled(q, weight, weight_scale, input_scale, offset, split, out)
