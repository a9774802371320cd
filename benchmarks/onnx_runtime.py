"""Speed of exported ONNX files over float32 ones, both in ONNX Runtime on a CPU, at the shapes of Wan 1.3B's block.

python benchmarks/onnx_runtime.py --out benchmarks/results/onnx_runtime.json

Runs are interleaved; a ratio is the median over rounds. CPU time is what a busy machine measures well on one thread.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import statistics
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import fxq
from fxq.environment import environment
from fxq.export.onnx import check_onnx, export_onnx
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout
from fxq.passes.methods.ranges import MinMax
from fxq.presets import wan_recipe

OUTLIERS = 64
Case = tuple[nn.Module, fx.GraphModule, tuple[Any, ...], tuple[Any, ...], Any]
"""(float model, quantized one, call to measure, example call, its dynamic shapes)."""


def block(widths: list[int]) -> nn.Module:
    """Linears with GELU between, under ``blocks.0``; 64 input channels of each stand out."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        linear = nn.Linear(widths[i], widths[i + 1])
        with torch.no_grad():
            linear.weight[:, :: widths[i] // OUTLIERS] *= 6
        layers += [linear, nn.GELU(approximate="tanh")] if i + 2 < len(widths) else [linear]
    return nn.Sequential(*layers)


class Model(nn.Module):
    """One block, so that the rule on outliers applies."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(widths)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [1, rows, channels]."""
        return self.blocks[0](x)


def linears(widths: list[int], rows: int, bits: int) -> Case:
    """One linear, or a FFN, on random rows."""
    model, x = Model(widths).eval(), torch.randn(1, rows, widths[0])
    shapes = ({1: torch.export.Dim.AUTO},)
    recipe = fxq.Recipe(
        name="block", rules=(fxq.Rule("*", fxq.Scheme(weight_bits=bits)),), methods=(MinMax(),), weighting="uniform"
    )
    quantized = fxq.quantize(model, [x], recipe, dynamic_shapes=shapes, progress=False)
    return model, quantized, (x,), (x,), shapes


def denoiser(rows: int, bits: int) -> Case:
    """A denoiser of one block: a call of 3 frames after one cached chunk, ``rows`` tokens rounded to whole frames."""
    model = CausalWan(CausalWanConfig(num_layers=1, text_len=16)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "blocks" in name:
            parameter.data[:, :: parameter.shape[1] // OUTLIERS] *= 4
    side = 2 * round((rows / 3) ** 0.5)
    draws = fxq.Draws([0], (6, 16, side, side))
    batches = [({"prompt_embeds": torch.randn(1, 16, 4096)}, draws)]
    rollout = SelfForcingRollout(model, batches, SamplerConfig(steps=(1000,)))
    recipe = wan_recipe("block", fxq.Scheme(weight_bits=bits), (MinMax(),), weighting="uniform")
    quantized = fxq.quantize(model, rollout, recipe, progress=False)
    calls: list[tuple[Any, ...]] = []

    def note(*args: Any) -> Any:
        calls.append(args)
        return model(*args)

    with rollout.using(note):
        rollout.rollout(*rollout.batches[0])
    example, shapes = rollout.example_call()
    return model, quantized, calls[-1], example, shapes


def export_pair(case: Case, folder: pathlib.Path) -> tuple[dict[str, str], list[np.ndarray]]:
    """Files of the float model and of the quantized one, and the inputs."""
    model, quantized, call, example, shapes = case
    integer, floats = export_onnx(quantized, folder / "integer.onnx"), folder / "float.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, example, str(floats), dynamo=True, dynamic_shapes=shapes, verbose=False)
    kernels = collections.Counter(entry.kernel for entry in check_onnx(integer) for _ in range(entry.products))
    print(", ".join(f"{count} {kernel}" for kernel, count in kernels.items()), end=" | ")
    return {"float32": str(floats), "integer": str(integer)}, [leaf.numpy() for leaf in pytree.tree_leaves(call)]


def session(path: str, threads: int) -> Any:
    """An ONNX Runtime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure(files: dict[str, str], inputs: list[np.ndarray], rounds: int, threads: int) -> dict[str, Any]:
    """Milliseconds of each file and the ratios of float32 to integer, interleaved."""
    sessions = {name: session(path, threads) for name, path in files.items()}
    feeds = {
        name: {info.name: value for info, value in zip(s.get_inputs(), inputs, strict=True)}
        for name, s in sessions.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    for i in range(rounds + 2):
        for name, s in sessions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            s.run(None, feeds[name])
            if i >= 2:
                times[name].append(((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3))
    found: dict[str, Any] = {}
    for clock, label in enumerate(("wall", "cpu")):
        columns = {name: [pair[clock] for pair in rows] for name, rows in times.items()}
        ratios = sorted(a / b for a, b in zip(columns["float32"], columns["integer"], strict=True))
        found[label] = {
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[len(ratios) // 4],
            "ratio_high": ratios[-1 - len(ratios) // 4],
            **{f"{name}_ms": statistics.median(values) for name, values in columns.items()},
        }
    return found


def main() -> None:
    """Measure attention's linear, the FFN and a denoiser of one block."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, default=8, choices=(4, 8))
    parser.add_argument("--cases", nargs="*", default=["1536,1536", "1536,8960,1536", "denoiser"])
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    results = []
    for text in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            widths = [] if text == "denoiser" else [int(width) for width in text.split(",")]
            case = linears(widths, options.rows, options.bits) if widths else denoiser(options.rows, options.bits)
            found = measure(*export_pair(case, pathlib.Path(folder)), options.rounds, options.threads)
        results.append({"case": text, "rows": options.rows, "bits": options.bits, "threads": options.threads} | found)
        cpu = found["cpu"]
        print(
            f"{options.rows} x {text}: CPU time {cpu['float32_ms']:.1f} ms in float32, {cpu['integer_ms']:.1f} ms in "
            f"integers, ratio {cpu['ratio']:.2f} ({cpu['ratio_low']:.2f}..{cpu['ratio_high']:.2f}), "
            f"{found['wall']['ratio']:.2f} by the wall clock"
        )
    if options.out is not None:
        facts = environment() | {"onnxruntime": onnxruntime.__version__}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"environment": facts, "results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
