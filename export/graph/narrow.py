"""Weights of fewer bits than the integers that kernels read: files hold their own bits, and multipliers of groups.

In memory a weight of 5 to 7 bits, or of 4 in groups of 32 channels with a multiplier each, is int8. A file has its bit
planes uint8 [N, bits, ceil(K / 8)], plane b of bit b of ``code + 2**(bits - 1)`` with the first channel lowest, and
beside it, of groups, ``weight_multiplier`` uint8 [N, ceil(K / 64)], two to a byte. Unpacked they are the same integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fxq.cache.codecs.packing import pack, unpack
from fxq.core.ir import LayerPlan
from fxq.numerics import PACK_BLOCK, integer_range
from fxq.passes.methods.grid import LARGEST, expanded, multipliers

MULTIPLIER = "weight_multiplier"
_NIBBLE = 4


class NarrowError(ValueError):
    """A weight that has not the form its plan states."""


def packed_tensors(plans: Iterable[LayerPlan], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name as a file holds them.

    Args:
        plans: of the layers.
        tensors: as the graph reads them.

    Raises:
        NarrowError: when integers of a group have no common multiplier, or do not fit their bits.
    """
    found = dict(tensors)
    for plan in plans:
        if plan.scheme is None or not plan.scheme.is_narrow:
            continue
        name, bits = f"{plan.layer}.weight", plan.quantization.weight_bits
        codes = found[name]
        if plan.quantization.weight_group:
            multiplier = multipliers(codes)
            codes = torch.div(codes, expanded(multiplier), rounding_mode="trunc")
            found[f"{plan.layer}.{MULTIPLIER}"] = pack(multiplier, _NIBBLE)
        low, high = integer_range(bits)
        if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
            kind = " times a multiplier of each 32 channels" if plan.quantization.weight_group else ""
            raise NarrowError(f"layer {plan.layer}: its integers are not all of {bits} bits{kind}")
        raised = (codes.to(torch.int16) - low).to(torch.uint8)
        found[name] = torch.stack([pack((raised >> bit) & 1, 1) for bit in range(bits)], 1)
    return found


def unpacked_tensors(plans: Iterable[LayerPlan], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name as a graph reads them; inverse of :func:`packed_tensors`.

    Raises:
        NarrowError: when one is missing or has another form.
    """
    found = dict(tensors)
    for plan in plans:
        if plan.scheme is None or not plan.scheme.is_narrow:
            continue
        bits, (rows, width) = plan.quantization.weight_bits, (plan.out_features, plan.in_features)
        planes = _taken(found, plan, "weight", (rows, bits, -(-width // 8)))
        codes = torch.zeros((rows, width), dtype=torch.int8, device=planes.device)
        for bit in range(bits):
            codes += (unpack(planes[:, bit], 1, width) << bit).to(torch.int8)
        codes += integer_range(bits)[0]
        if plan.quantization.weight_group:
            blocks = width // PACK_BLOCK
            multiplier = unpack(_taken(found, plan, MULTIPLIER, (rows, -(-blocks // 2))), _NIBBLE, blocks)
            if not bool(multiplier.all()):
                raise NarrowError(f"layer {plan.layer}: a multiplier is 0, expected 1..{LARGEST}")
            codes *= expanded(multiplier.to(torch.int8))
        found[f"{plan.layer}.weight"] = codes
    return found


def _taken(tensors: dict[str, Tensor], plan: LayerPlan, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a layer, taken out."""
    tensor = tensors.pop(f"{plan.layer}.{name}", None)
    if tensor is None or tensor.dtype != torch.uint8 or tuple(tensor.shape) != shape:
        given = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise NarrowError(f"layer {plan.layer}: {name} is {given}, expected torch.uint8 {shape}")
    return tensor
