"""Matrix products of a graph that are no linear: nothing quantizes them, and a summary must not hide them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from fxq.core.ir import LayerPlan, get_tensor

_PRODUCTS = """
    addbmm addmm addmv baddbmm bilinear bmm chain_matmul conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d convolution einsum gru gru_cell inner linalg_matmul linalg_multi_dot lstm lstm_cell matmul mm mv
    rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell tensordot _convolution _grouped_mm _native_multi_head_attention
    _scaled_mm _transformer_encoder_layer_fwd _trilinear
"""
_NAMES = frozenset(_PRODUCTS.split())

LOW_RANK = ("low_rank_down", "low_rank_up")
"""Tensors [K, r] and [r, N] under a layer's name: its input times both is added to its output."""
TRANSFORM_TENSORS = ("rotation", "smoothing", *LOW_RANK)
"""What the shipped transforms (:mod:`fxq.passes.transforms`) store under a layer's name."""


def low_rank_branch(module: fx.GraphModule, plan: LayerPlan) -> Tensor | None:
    """float32 [N, K]: what the graph adds to a layer's weight in floats; None where it adds nothing."""
    buffers = dict(module.named_buffers(remove_duplicate=False)) if "LowRank" in plan.transform else {}
    down, up = (buffers.get(f"{plan.layer}.{name}") for name in LOW_RANK)
    return None if down is None or up is None else (down.float() @ up.float()).T


@dataclasses.dataclass(frozen=True)
class OtherProduct:
    """A stored tensor that a product other than a linear reads.

    ``layer`` is its name without ``.weight``, ``operator`` the product, ``shape`` (outputs, inputs of each) for
    convolutions and (all but the last axis, last axis) else, ``size`` its number of elements.
    """

    layer: str
    operator: str
    shape: tuple[int, int]
    size: int


def other_products(module: fx.GraphModule) -> Iterator[OtherProduct]:
    """Products with stored operands of two axes or more, in graph order, each tensor once.

    Operands that are computed from stored tensors alone (a transposed or normalised weight) count as them. Products of
    activations, as attention has them, do not.
    """
    stored: dict[fx.Node, list[str]] = {}
    seen: set[str] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            stored[node] = [str(node.target)]
        elif node.op == "call_function" and (inputs := node.all_input_nodes):
            if all(read in stored for read in inputs):
                stored[node] = [name for read in inputs for name in stored[read]]
            elif isinstance(node.target, torch._ops.OpOverload) and _name(node.target) in _NAMES:
                for name in (name for read in inputs for name in stored.get(read, ())):
                    tensor = _matrix(module, name)
                    if tensor is not None and name not in seen:
                        seen.add(name)
                        yield _product(name, f"aten.{_name(node.target)}", tensor)


def _name(target: torch._ops.OpOverload) -> str:
    namespace, _, name = target._schema.name.partition("::")
    return name if namespace == "aten" else ""


def _matrix(module: fx.GraphModule, name: str) -> Tensor | None:
    try:
        tensor = get_tensor(module, name)
    except (AttributeError, TypeError):
        return None
    return tensor if tensor.ndim >= 2 and tensor.numel() and tensor.is_floating_point() else None


def _product(name: str, operator: str, tensor: Tensor) -> OtherProduct:
    columns = tensor[0].numel() if "conv" in operator else tensor.shape[-1]
    return OtherProduct(name.removesuffix(".weight"), operator, (tensor.numel() // columns, columns), tensor.numel())
