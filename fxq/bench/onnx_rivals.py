"""ONNX Runtime and OpenVINO on a quantized ONNX model of one linear, or of linear, GELU and linear.

Whether they run int8 depends on the form of the model: activations have rank 3 and biases are int32, or ONNX Runtime
fuses MatMul and Add to a float Gemm. What ran is read from the optimized model and reported.
"""

from __future__ import annotations

import collections
import importlib
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fxq.bench.contest import Built

Range = tuple[float, float]


class _Graph:
    """Nodes and constants of an ONNX graph that computes ``value``."""

    def __init__(self) -> None:
        self.helper = importlib.import_module("onnx.helper")
        self.to_tensor = importlib.import_module("onnx.numpy_helper").from_array
        self.nodes: list[object] = []
        self.constants: list[object] = []

    def constant(self, array: object) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(self.to_tensor(np.ascontiguousarray(array), name))
        return name

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: object) -> list[str]:
        names = [f"n{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(self.helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def static_linear(self, x: str, linear: nn.Linear, span: Range) -> str:
        """QuantizeLinear and DequantizeLinear around MatMul and Add."""
        low, high = min(span[0], 0.0), max(span[1], 0.0)
        input_scale = np.float32((high - low) / 255)
        weight, scale = _integers(linear)
        width = len(scale)
        s, z = self.constant(input_scale), self.constant(np.uint8(round(-low / input_scale)))
        (q,) = self.node("QuantizeLinear", x, s, z)
        (xd,) = self.node("DequantizeLinear", q, s, z)
        zeros = self.constant(np.zeros(width, np.int8))
        (wd,) = self.node("DequantizeLinear", self.constant(weight.T), self.constant(scale), zeros, axis=1)
        (y,) = self.node("MatMul", xd, wd)
        bias = np.rint(_bias(linear) / (scale * input_scale)).astype(np.int32)
        none = self.constant(np.zeros(width, np.int32))
        (b,) = self.node("DequantizeLinear", self.constant(bias), self.constant(scale * input_scale), none, axis=0)
        return self.node("Add", y, b)[0]

    def dynamic_linear(self, x: str, linear: nn.Linear, unsigned: bool) -> str:
        """DynamicQuantizeLinear and MatMulInteger, with weights as int8 or, around 128, as uint8."""
        float_type = importlib.import_module("onnx").TensorProto.FLOAT
        weight, scale = _integers(linear)
        q, s, z = self.node("DynamicQuantizeLinear", x, outputs=3)
        stored: list[NDArray[Any]] = [weight.T, np.zeros(len(scale), np.int8)]
        if unsigned:
            stored = [(array.astype(np.int16) + 128).astype(np.uint8) for array in stored]
        w, zeros = map(self.constant, stored)
        (y,) = self.node("MatMulInteger", q, w, z, zeros)
        (y,) = self.node("Cast", y, to=float_type)
        (both,) = self.node("Mul", s, self.constant(scale))
        (y,) = self.node("Mul", y, both)
        return self.node("Add", y, self.constant(_bias(linear)))[0]


def _integers(linear: nn.Linear) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    weight = linear.weight.detach().cpu()
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8).numpy(), scale.numpy()


def _bias(linear: nn.Linear) -> NDArray[np.float32]:
    return linear.bias.detach().cpu().numpy()


def write_model(
    layers: Sequence[nn.Module], x: Tensor, ranges: Sequence[Range], dynamic: bool, path: str, unsigned: bool = False
) -> None:
    """Write the quantized model of linears and GELUs.

    Args:
        layers: nn.Linear and nn.GELU in order.
        x: input [1, M, K].
        ranges: least and largest input of each linear.
        dynamic: MatMulInteger with scales at run time instead of static QDQ.
        path: .onnx file.
        unsigned: weights of MatMulInteger as uint8, whose products do not saturate on CPUs without VNNI.
    """
    onnx = importlib.import_module("onnx")
    graph, name, spans = _Graph(), "x", iter(ranges)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            span = next(spans)
            name = graph.dynamic_linear(name, layer, unsigned) if dynamic else graph.static_linear(name, layer, span)
        else:
            (name,) = graph.node("Gelu", name, approximate="tanh")
    outputs = [layer for layer in layers if isinstance(layer, nn.Linear)][-1].out_features
    graph.nodes.append(graph.helper.make_node("Identity", [name], ["y"]))
    info, kind = graph.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    ends = [info("x", kind, list(x.shape))], [info("y", kind, [*x.shape[:-1], outputs])]
    body = graph.helper.make_graph(graph.nodes, "linears", *ends, graph.constants)
    model = graph.helper.make_model(body, opset_imports=[graph.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, path)


def onnxruntime(
    layers: Sequence[nn.Module],
    x: Tensor,
    ranges: Sequence[Range],
    dynamic: bool,
    threads: int,
    unsigned: bool = False,
) -> Built:
    """An ONNX Runtime session on the CPU; ``kernel`` lists the operators of its optimized model."""
    ort, onnx = importlib.import_module("onnxruntime"), importlib.import_module("onnx")
    with tempfile.TemporaryDirectory() as folder:
        path, fused = (str(pathlib.Path(folder) / name) for name in ("model.onnx", "fused.onnx"))
        write_model(layers, x, ranges, dynamic, path, unsigned)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        options.optimized_model_filepath = fused
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        kinds = collections.Counter(node.op_type for node in onnx.load(fused, load_external_data=False).graph.node)
    feed = {"x": x.numpy()}
    kernel = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return Built(
        lambda: session.run(None, feed), kernel, lambda: torch.from_numpy(session.run(None, feed)[0]), facts=dict(kinds)
    )


def openvino(
    layers: Sequence[nn.Module],
    x: Tensor,
    ranges: Sequence[Range],
    dynamic: bool,
    threads: int,
    precision: str | None = None,
) -> Built:
    """An OpenVINO CPU model for latency; ``precision`` is the hint for what is not quantized."""
    ov = importlib.import_module("openvino")
    settings: dict[str, object] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder) / "model.onnx")
        write_model(layers, x, ranges, dynamic, path)
        model = ov.Core().compile_model(path, "CPU", settings)
    request = model.create_infer_request()
    array = x.numpy()
    request.set_input_tensor(ov.Tensor(array, shared_memory=True))

    def output() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data.copy())

    return Built(request.infer, ", ".join(_primitives(model)), output)


def _primitives(model: Any) -> list[str]:
    """Kernels of the matrix products in a compiled OpenVINO model."""
    found = []
    for op in model.get_runtime_model().get_ops():
        facts = op.get_rt_info()
        if "primitiveType" in facts and facts["layerType"].value == "FullyConnected":
            found.append(str(facts["primitiveType"].value))
    return found or ["no FullyConnected"]
