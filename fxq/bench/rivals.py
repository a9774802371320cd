"""What this library is compared with: torch in float, and other libraries' int8 where they are installed."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxq import cpu
from fxq.bench import onnx_rivals
from fxq.bench.contest import BF16, FP32, Built, Contestant
from fxq.bench.floats import compiled, eager, onednn
from fxq.bench.problems import Problem
from fxq.cpu import no_bfloat16
from fxq.dtypes import dtype_name
from fxq.kernels.gemm.op import int_mm


@dataclass(frozen=True)
class Rival:
    """An adapter to another way to compute a problem.

    Attributes:
        name: shown in tables.
        build: (problem, threads) to something that runs.
        arithmetic: "float32", "bfloat16", "int8" or "float8", which decides the accuracy it owes.
        dtype: of the float inputs and outputs.
        needs: package, or "".
        devices: device types it runs on.
        levels: where it takes part.
        obstacle: why it cannot run on this machine, or ""; asked, not tried.
    """

    name: str
    build: Callable[[Problem, int], Built]
    arithmetic: str = "int8"
    dtype: torch.dtype = torch.bfloat16
    needs: str = ""
    devices: tuple[str, ...] = ("cpu",)
    levels: tuple[str, ...] = ("linear",)
    obstacle: Callable[[], str] = lambda: ""

    def contestant(self, problem: Problem, threads: int, bounds: dict[str, float]) -> Contestant:
        """The rival on a problem; ``bounds`` is the least SQNR by arithmetic."""
        return Contestant(
            self.name,
            lambda: self.build(problem, threads),
            bounds[self.arithmetic],
            self.arithmetic,
            dtype_name(self.dtype),
            self.needs,
            obstacle=self.obstacle(),
        )


def input_ranges(problem: Problem) -> dict[str, tuple[float, float]]:
    """Least and largest input of every linear by name, on the problem's own inputs."""
    ranges: dict[str, tuple[float, float]] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            ranges[name] = float(args[0].min()), float(args[0].max())

        return hook

    model = copy.deepcopy(problem.module)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(observe(name))
    model(*problem.args(torch.float32))
    return ranges


def replace_linears(problem: Problem, make: Callable[[nn.Linear, float], nn.Module]) -> nn.Module:
    """A bfloat16 copy of the model whose linears are ``make(float32 linear, largest absolute input)``."""
    model = problem.model(torch.bfloat16)
    for name, (low, high) in input_ranges(problem).items():
        parent, _, leaf = name.rpartition(".")
        linear = problem.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), leaf, make(linear, max(-low, high)))
    return model


class IntMM(nn.Module):
    """Static symmetric int8 by ``torch._int_mm``, quantized and dequantized by eager operations."""

    def __init__(self, linear: nn.Linear, top: float) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1) / 127
        self.weight = (linear.weight / scale[:, None]).round().to(torch.int8)
        self.inverse, self.scale, self.bias = 127 / top, scale * (top / 127), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] -> [..., N]."""
        q = (x.flatten(0, -2) * self.inverse).round().clamp(-127, 127).to(torch.int8)
        y = int_mm(q, self.weight).float() * self.scale + self.bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class ScaledMM(nn.Module):
    """float8 e4m3 by ``torch._scaled_mm`` with one static scale for activations and one for weights."""

    def __init__(self, linear: nn.Linear, top: float) -> None:
        super().__init__()
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = linear.weight.abs().max() / largest
        self.weight = (linear.weight / scale).to(torch.float8_e4m3fn)
        self.inverse, self.weight_scale = largest / top, scale.float()
        self.input_scale = torch.tensor(top / largest, dtype=torch.float32, device=linear.weight.device)
        self.bias = linear.bias.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] -> [..., N]."""
        q = (x.flatten(0, -2) * self.inverse).to(torch.float8_e4m3fn)
        scales = self.input_scale, self.weight_scale
        y = torch._scaled_mm(q, self.weight.t(), *scales, bias=self.bias, out_dtype=torch.bfloat16)
        return y.unflatten(0, x.shape[:-1])


def _replaced(make: Callable[[nn.Linear, float], nn.Module], kernel: str, inductor: bool = False) -> Any:
    def build(problem: Problem, threads: int) -> Built:
        model, args = replace_linears(problem, make), problem.args(torch.bfloat16)
        run = torch.compile(model, dynamic=False) if inductor else model
        return Built(lambda: run(*args), kernel)

    return build


def torchao_dynamic(problem: Problem, threads: int) -> Built:
    """Activation scales per row at run time, weights per output channel."""
    ao = importlib.import_module("torchao.quantization")
    model, args = problem.model(torch.bfloat16), problem.args(torch.bfloat16)
    # Its default changes inductor's settings of the whole process, and with them the other contestants.
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    run = torch.compile(model, dynamic=False)
    return Built(lambda: run(*args), "torchao, inductor")


def torchao_static(problem: Problem, threads: int) -> Built:
    """One activation scale per layer from the problem's inputs, weights per output channel."""
    ao = importlib.import_module("torchao.quantization")
    model, args = problem.model(torch.bfloat16), problem.args(torch.bfloat16)
    for layer, (low, high) in input_ranges(problem).items():
        scale = torch.full((1, 1, 1), max(-low, high) / 127, dtype=torch.bfloat16, device=args[0].device)
        config = ao.Int8StaticActivationInt8WeightConfig(
            act_quant_scale=scale, granularity=[ao.PerTensor(), ao.PerRow()], set_inductor_config=False
        )
        ao.quantize_(model, config, filter_fn=lambda _, name, layer=layer: name == layer)
    run = torch.compile(model, dynamic=False)
    return Built(lambda: run(*args), "torchao, inductor")


def x86_inductor(problem: Problem, threads: int) -> Built:
    """Quantization in the exported graph by X86InductorQuantizer, static, and inductor with freezing."""
    pt2e = importlib.import_module("torchao.quantization.pt2e")
    prepare = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    args = problem.args(torch.float32)
    exported: object = torch.export.export(problem.module, args).module()
    prepared = prepare.prepare_pt2e(exported, quantizer)
    prepared(*args)
    model = prepare.convert_pt2e(prepared)
    pt2e.move_exported_model_to_eval(model)
    run: Callable[..., object] = torch.compile(model, dynamic=False)
    return Built(lambda: run(*args), "onednn.qlinear, inductor")


def gemlite(problem: Problem, threads: int) -> Built:
    """GemLite's Triton int8 with scales per row at run time."""
    helper = importlib.import_module("gemlite.helper")
    device = next(problem.module.parameters()).device
    int8 = getattr(helper, "A8W8_INT8_dynamic", None) or helper.A8W8_int8_dynamic  # its older name
    processor = int8(device=str(device), dtype=torch.bfloat16)
    model = replace_linears(problem, lambda linear, _: processor.from_linear(copy.deepcopy(linear).bfloat16()))
    args = problem.args(torch.bfloat16)
    return Built(lambda: model(*args), "gemlite")


def _onnx(run: Callable[..., Built], dynamic: bool, **options: object) -> Callable[[Problem, int], Built]:
    def build(problem: Problem, threads: int) -> Built:
        layers = list(problem.module.get_submodule("blocks.0").children())
        x = problem.args(torch.float32)[0]
        return run(layers, x, list(input_ranges(problem).values()), dynamic, threads, **options)

    return build


_BOTH, _ALL = ("cpu", "cuda"), ("linear", "block")
RIVALS: tuple[Rival, ...] = (
    Rival(FP32, lambda p, _: eager(p, torch.float32), "float32", torch.float32, "", _BOTH, _ALL),
    Rival(BF16, lambda p, _: eager(p, torch.bfloat16), "bfloat16", torch.bfloat16, "", _BOTH, _ALL),
    Rival("fp32 compiled", lambda p, _: compiled(p, torch.float32), "float32", torch.float32, "", _BOTH, _ALL),
    Rival("bf16 compiled", lambda p, _: compiled(p, torch.bfloat16), "bfloat16", torch.bfloat16, "", _BOTH, _ALL),
    Rival("fp32 oneDNN", lambda p, _: onednn(p, torch.float32), "float32", torch.float32, levels=_ALL),
    Rival(
        "bf16 oneDNN",
        lambda p, _: onednn(p, torch.bfloat16),
        "bfloat16",
        levels=_ALL,
        obstacle=no_bfloat16,
    ),
    Rival("_int_mm, eager dequantize", _replaced(IntMM, "_int_mm"), devices=_BOTH, levels=_ALL),
    Rival("torchao dynamic int8", torchao_dynamic, needs="torchao", devices=_BOTH, levels=_ALL),
    Rival("torchao static int8", torchao_static, needs="torchao", devices=_BOTH, levels=_ALL),
    Rival("PT2E x86 inductor", x86_inductor, dtype=torch.float32, needs="torchao", levels=_ALL),
    Rival("onnxruntime QDQ", _onnx(onnx_rivals.onnxruntime, False), dtype=torch.float32, needs="onnxruntime"),
    Rival("onnxruntime MatMulInteger", _onnx(onnx_rivals.onnxruntime, True), dtype=torch.float32, needs="onnxruntime"),
    Rival(
        "onnxruntime MatMulInteger u8",
        _onnx(onnx_rivals.onnxruntime, True, unsigned=True),
        dtype=torch.float32,
        needs="onnxruntime",
        obstacle=lambda: "" if cpu.saturates() else "products with int8 weights are exact on this CPU",
    ),
    Rival("OpenVINO QDQ", _onnx(onnx_rivals.openvino, False), dtype=torch.float32, needs="openvino"),
    Rival(
        "OpenVINO QDQ, bf16 hint",
        _onnx(onnx_rivals.openvino, False, precision="bf16"),
        dtype=torch.float32,
        needs="openvino",
    ),
    Rival(
        "_scaled_mm fp8, compiled", _replaced(ScaledMM, "cublasLt fp8", True), "float8", devices=("cuda",), levels=_ALL
    ),
    Rival("GemLite int8", gemlite, needs="gemlite", devices=("cuda",), levels=_ALL),
)
"""Every rival, in the order of tables."""


def rivals_for(level: str, device: str) -> tuple[Rival, ...]:
    """Rivals that take part at a level on a device such as "cpu" or "cuda:0"."""
    kind = torch.device(device).type
    return tuple(rival for rival in RIVALS if level in rival.levels and kind in rival.devices)
