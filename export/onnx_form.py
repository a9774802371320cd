"""The form of an ONNX graph in which runtimes multiply integers: what the converter leaves is brought to it."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from fxq.core.ir import LayerPlan
from fxq.passes.qdq.qdq_layers import may_saturate

if TYPE_CHECKING:
    import onnx_ir


def integer_form(model: onnx_ir.Model, plans: Mapping[str, LayerPlan], vnni: bool = True) -> None:
    """Bring the products of quantized layers to a form that runtimes keep in integers; in place.

    Weights are stored [K, N], as MatMul reads them, and in half a byte when they have 4 bits. Products and offset are
    added by one ``Sum``: of ``MatMul`` and ``Add`` ONNX Runtime makes a Gemm before it looks for integers.

    Without VNNI, weights of layers whose u8 x s8 products may saturate there are stored as uint8 around 128:
    runtimes multiply u8 x u8 in 16 bits and add in 32.

    Args:
        model: onnx_ir.Model made of a graph of :class:`~fxq.passes.qdq.to_qdq.ToQdq`.
        plans: of the quantized layers.
        vnni: whether the CPUs that run it have VNNI.
    """
    import onnx_ir as ir

    for layer, plan in plans.items():
        for name in (f"{layer}.weight", f"{layer}.outlier_weight"):
            value = model.graph.initializers.get(name)
            if value is not None:
                _store_as_read(ir, value)
                if plan.quantization.weight_bits == 4:
                    _store_in_half_bytes(ir, model, value)
                elif may_saturate(plan.quantization) and not vnni:
                    _store_unsigned(ir, model, value)
        offset = model.graph.initializers.get(f"{layer}.offset")
        for node, _ in [] if offset is None else list(offset.uses()):
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
    """Take largest values by TopK.

    ONNX Runtime 1.31 gives a reduction of an empty input the input's own shape, and inputs are empty where a call has
    no text.
    """
    name = _free_name("fxq_one", model.graph.initializers)
    count = ir.Value(name=name, const_value=ir.tensor([1], dtype=ir.DataType.INT64, name=name))
    count.dtype, count.shape = ir.DataType.INT64, ir.Shape([1])
    found = [node for node in model.graph if node.op_type == "ReduceMax" and _is_last_axis_kept(node)]
    for node in found:
        largest = ir.node("TopK", [node.inputs[0], count], attributes={"axis": -1}, num_outputs=2, name=node.name)
        old, new = node.outputs[0], largest.outputs[0]
        new.name, new.type, new.shape, largest.outputs[1].name = old.name, old.type, old.shape, f"{old.name}_at"
        node.graph.insert_after(node, largest)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)
    if found:
        model.graph.register_initializer(count)


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
    """``Add(Add(product, product), offset)`` as one ``Sum``."""
    terms = list(last.inputs)
    first = terms[0].producer()
    if first is not None and first.op_type == "Add" and len(first.outputs[0].uses()) == 1:
        terms = [*first.inputs, terms[1]]
    total = ir.node("Sum", terms, name=last.name)
    total.outputs[0].name, total.outputs[0].type = last.outputs[0].name, last.outputs[0].type
    total.outputs[0].shape = last.outputs[0].shape
    last.graph.insert_after(last, total)
    ir.convenience.replace_all_uses_with(last.outputs[0], total.outputs[0], replace_graph_outputs=True)
    last.graph.remove(last, safe=True)
    if len(terms) == 3:
        first.graph.remove(first, safe=True)


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
