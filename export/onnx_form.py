"""The form of an ONNX graph in which runtimes multiply integers: what the converter leaves is brought to it."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from fxq.core.ir import LayerPlan
from fxq.passes.qdq.qdq_layers import may_saturate

if TYPE_CHECKING:
    import onnx
    import onnx_ir


WEIGHTS = ("weight", "outlier_weight", "weight_rest", "outlier_weight_rest")
"""Tensors of integers that a layer may have."""


def integer_form(model: onnx_ir.Model, plans: Mapping[str, LayerPlan], vnni: bool = True, nibbles: bool = True) -> None:
    """Bring the products of quantized layers to a form that runtimes keep in integers; in place.

    Weights are stored [K, N], as MatMul reads them, and in half a byte when they have 4 bits. Products and offset are
    added by one ``Sum``: of ``MatMul`` and ``Add`` ONNX Runtime makes a Gemm before it looks for integers.

    Without VNNI, weights of layers whose u8 x s8 products may saturate there are stored as uint8 around 128:
    runtimes multiply u8 x u8 in 16 bits and add in 32.

    Args:
        model: onnx_ir.Model made of a graph of :class:`~fxq.passes.qdq.to_qdq.ToQdq`.
        plans: of the quantized layers.
        vnni: whether the CPUs that run it have VNNI, or the weights are in halves that cannot saturate.
        nibbles: whether 4-bit weights may be stored in half a byte.
    """
    import onnx_ir as ir

    for layer, plan in plans.items():
        for name in (f"{layer}.{part}" for part in WEIGHTS):
            value = model.graph.initializers.get(name)
            if value is not None:
                _store_as_read(ir, value)
                if plan.quantization.code_bits == 4 and nibbles:
                    _store_in_half_bytes(ir, model, value)
                elif may_saturate(plan.quantization) and not vnni:
                    _store_unsigned(ir, model, value)
        offset = model.graph.initializers.get(f"{layer}.offset")
        for node, _ in [] if offset is None else list(offset.uses()):
            _sum_at_once(ir, node)
    for node in [node for node in model.graph if node.op_type == "Add"]:
        if all(value.producer() is not None and value.producer().op_type == "MatMul" for value in node.inputs):
            _sum_at_once(ir, node)
    if any(plan.quantization.per_token for plan in plans.values()):
        _largest_of_none(ir, model)
    for node in model.graph:
        node.metadata_props.clear()  # what the converter notes about its own work, more than the nodes themselves
    _name_apart(model.graph)


def _name_apart(graph: onnx_ir.Graph) -> None:
    """Give values of one name names of their own: a parameter that is called as an input or an output, for example.

    Inputs and outputs keep theirs, by which callers know them; a tensor of the model gets ``_`` behind its name.
    """
    made = itertools.chain.from_iterable(node.outputs for node in graph)
    values = list({id(v): v for v in (*graph.inputs, *graph.outputs, *made, *graph.initializers.values())}.values())
    taken, given = {value.name for value in values}, set[str]()
    for value in values:
        if value.name in given:
            value.name = _free_name(value.name, taken)
            taken.add(value.name)
        if value.name:
            given.add(value.name)


def _free_name(name: str, taken: Container[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _largest_of_none(ir: ModuleType, model: onnx_ir.Model) -> None:
    """Keep one of the largest values.

    ONNX Runtime 1.31 gives a reduction of an empty input the input's own shape, and inputs are empty where a call has
    no text. Of others the piece is all there is.
    """
    found = [node for node in model.graph if node.op_type == "ReduceMax" and _is_last_axis_kept(node)]
    if not found:
        return
    ends = []
    for what, number in (("start", 0), ("end", 1), ("axis", -1)):
        name = _free_name(f"fxq_{what}", model.graph.initializers)
        ends.append(ir.Value(name=name, const_value=ir.tensor([number], dtype=ir.DataType.INT64, name=name)))
        ends[-1].dtype, ends[-1].shape = ir.DataType.INT64, ir.Shape([1])
        model.graph.register_initializer(ends[-1])
    for node in found:
        old = node.outputs[0]
        piece = ir.node("Slice", [old, *ends], name=f"{node.name}_one")
        new = piece.outputs[0]
        new.name, new.type, new.shape = f"{old.name}_one", old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        piece.replace_input_with(0, old)
        node.graph.insert_after(node, piece)


def _is_last_axis_kept(node: onnx_ir.Node) -> bool:
    axes = None if len(node.inputs) < 2 else node.inputs[1].const_value
    kept = "keepdims" not in node.attributes or node.attributes["keepdims"].value == 1
    return kept and axes is not None and axes.numpy().tolist() == [-1]


def _chains(weight: onnx_ir.Value) -> Iterator[tuple[onnx_ir.Node, onnx_ir.Node]]:
    """(DequantizeLinear, Transpose) pairs that read a weight."""
    for node, _ in weight.uses():
        for reader, _ in node.outputs[0].uses():
            if node.op_type == "DequantizeLinear" and reader.op_type == "Transpose":
                yield node, reader


def _sum_at_once(ir: ModuleType, last: onnx_ir.Node) -> None:
    """``Add(Add(product, product), offset)``, however deep, as one ``Sum``."""
    terms: list[onnx_ir.Value] = []
    inner: list[onnx_ir.Node] = []
    todo = [value for value in last.inputs if value is not None]
    while todo:
        value = todo.pop(0)
        node = value.producer()
        if node is not None and node.op_type == "Add" and len(value.uses()) == 1:
            inner.append(node)
            todo = [*(part for part in node.inputs if part is not None), *todo]
        else:
            terms.append(value)
    total = ir.node("Sum", terms, name=last.name)
    total.outputs[0].name, total.outputs[0].type = last.outputs[0].name, last.outputs[0].type
    total.outputs[0].shape = last.outputs[0].shape
    last.graph.insert_after(last, total)
    ir.convenience.replace_all_uses_with(last.outputs[0], total.outputs[0], replace_graph_outputs=True)
    for node in (last, *inner):
        node.graph.remove(node, safe=True)


def _store_as_read(ir: ModuleType, weight: onnx_ir.Value) -> None:
    chains = list(_chains(weight))
    if not chains or len(chains) != len(weight.uses()):
        return
    values = weight.const_value.numpy().T.copy()
    weight.const_value = ir.tensor(values, name=weight.name)
    weight.shape = ir.Shape(values.shape)
    for dequantize, transpose in chains:
        dequantize.attributes["axis"] = ir.AttrInt64("axis", 1)
        dequantize.outputs[0].shape = ir.Shape(values.shape)
        ir.convenience.replace_all_uses_with(transpose.outputs[0], dequantize.outputs[0])
        transpose.graph.remove(transpose, safe=True)


def _store_unsigned(ir: ModuleType, model: onnx_ir.Model, weight: onnx_ir.Value) -> None:
    """Weights plus 128, and 128 as the zero point of every output."""
    values = (weight.const_value.numpy().astype("int16") + 128).astype("uint8")
    weight.const_value = ir.tensor(values, name=weight.name)
    weight.dtype = ir.DataType.UINT8
    zeros: dict[int, onnx_ir.Value] = {}
    for dequantize, _ in list(weight.uses()):
        outputs = values.shape[dequantize.attributes["axis"].value]
        if outputs not in zeros:
            name = _free_name(f"{weight.name}_zero_point", model.graph.initializers)
            zero = ir.Value(name=name, const_value=ir.tensor([128] * outputs, dtype=ir.DataType.UINT8, name=name))
            zero.dtype, zero.shape = ir.DataType.UINT8, ir.Shape([outputs])
            model.graph.register_initializer(zero)
            zeros[outputs] = zero
        dequantize.resize_inputs(3)
        dequantize.replace_input_with(2, zeros[outputs])


def _store_in_half_bytes(ir: ModuleType, model: onnx_ir.Model, weight: onnx_ir.Value) -> None:
    values, readers = weight.const_value.numpy(), list(weight.uses())
    weight.const_value = ir.tensor(values, dtype=ir.DataType.INT4, name=weight.name)
    weight.dtype = ir.DataType.INT4
    cast = ir.node("Cast", [weight], attributes={"to": ir.DataType.INT8}, name=f"{weight.name}_cast")
    cast.outputs[0].name = f"{weight.name}_int8"
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.INT8, ir.Shape(values.shape)
    model.graph.insert_before(model.graph[0], cast)
    for reader, index in readers:
        reader.replace_input_with(index, cast.outputs[0])


def tensorrt_faults(model: onnx.ModelProto) -> list[str]:
    """What TensorRT's parser would refuse in a file, or not multiply in integers; empty where there is nothing.

    The rules are those of "Working with Quantized Types" of its documentation (10.x): int8 alone, zero points 0, scales
    constant and positive, a scale per tensor for activations and per output channel for weights, a DequantizeLinear of
    the same scale behind each QuantizeLinear, and every quantized product between two of them.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    faults = [
        f"{tensor.name} has {_type_name(tensor.data_type)} elements"
        for tensor in constants.values()
        if _type_name(tensor.data_type) in ("UINT8", "INT4", "UINT4", "INT16", "UINT16")
    ]
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            faults += [f"{node.op_type} of {node.input[0]}: {fault}" for fault in _qdq_faults(node, constants, makers)]
        if node.op_type == "MatMul":
            sides = [makers.get(name) for name in node.input]
            if sum(side is not None and side.op_type == "DequantizeLinear" for side in sides) == 1:
                faults.append(f"MatMul {node.output[0]}: one side is quantized and the other is not")
    return faults


def _qdq_faults(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], makers: Mapping[str, onnx.NodeProto]
) -> Iterator[str]:
    from onnx import numpy_helper

    scale, zero = (constants.get(name) for name in [*node.input[1:3], "", ""][:2])
    if scale is None:
        yield "the scale is no constant"
        return
    values = numpy_helper.to_array(scale)
    if not (values > 0).all():
        yield "a scale is not positive"
    if len(node.input) > 2 and node.input[2]:
        if zero is None:
            yield "the zero point is no constant"
        elif _type_name(zero.data_type) != "INT8" or numpy_helper.to_array(zero).any():
            yield "the zero point is not 0 in int8"
    elif node.op_type == "QuantizeLinear":
        yield "without a zero point it gives uint8"
    stored = node.input[0] in constants
    if values.size > 1 and not stored:
        yield "an activation has more than one scale"
    if stored or node.op_type == "QuantizeLinear":
        return
    maker = makers.get(node.input[0])
    before = None if maker is None or maker.op_type != "QuantizeLinear" else constants.get(maker.input[1])
    if before is None or numpy_helper.to_array(before).tolist() != values.tolist():
        yield "no QuantizeLinear of the same scale is before it"


def _type_name(number: int) -> str:
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(number))
