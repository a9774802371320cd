"""Forms of an 8-bit product in ONNX over torch's float32, each right or wrong on this CPU.

OMP_NUM_THREADS=1 python -m benchmarks.onnx_forms --out benchmarks/results/onnx_forms.json

Behind `tests/machine/as_avx2 env` it measures a CPU without VNNI. One thread, interleaved rounds of CPU
time; a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import onnxruntime
import torch
from torch import Tensor, nn

import fxq
from benchmarks.record import write
from fxq import cpu
from fxq.passes.methods.ranges import MinMax

ROWS, WIDTH = 512, 1536
FORMS = {"signed (vnni=True)": {"vnni": True}, "unsigned (vnni=False)": {"vnni": False}, "halves": {"in_halves": True}}


def session(path: pathlib.Path, x: Tensor) -> Callable[[], Tensor]:
    """A call of a file by ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    runtime = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {runtime.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(runtime.run(None, feed)[0])


def seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval().requires_grad_(False), torch.randn(ROWS, WIDTH)
    rules = (fxq.Rule("*", fxq.Scheme(dual_scale=False)),)
    recipe = fxq.Recipe(name="one", rules=rules, methods=(MinMax(),), weighting="uniform")
    quantized = fxq.quantize(model, [x], recipe, progress=False)
    calls: dict[str, Callable[[], Tensor]] = {"float32": lambda: model(x)}
    with tempfile.TemporaryDirectory() as folder:
        for name, form in FORMS.items():
            calls[name] = session(fxq.export_onnx(quantized, pathlib.Path(folder, f"{len(calls)}.onnx"), **form), x)
        exact, times = model(x), {name: list[float]() for name in calls}
        for call in calls.values():
            call()
        for _ in range(args.rounds):
            for name, call in calls.items():
                times[name].append(seconds(call))
        rows = {
            name: {
                "over float32": statistics.median(f / t for f, t in zip(times["float32"], times[name], strict=True)),
                "sqnr": float(10 * torch.log10(exact.square().sum() / (call() - exact).square().sum())),
            }
            for name, call in calls.items()
            if name != "float32"
        }
    result = {
        "rows": rows,
    }
    write(args.out, result, onnxruntime=onnxruntime.__version__, vnni=cpu.has_vnni())
    for name, row in rows.items():
        print(f"{name:<24} {row['over float32']:.2f}x float32, {row['sqnr']:.1f} dB")


if __name__ == "__main__":
    main()
