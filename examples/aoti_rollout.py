"""Generate a whole video with a program compiled ahead of time, in a process that imports torch and not fxq.

python examples/aoti_rollout.py

``main`` quantizes the tiny model, compiles it with AOTInductor, runs this file again in a process of its own, and
compares the video with the one of fxq. The sampling loop is that of ``onnx_rollout.py`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx_rollout import Array, Run, generate, quantize_tiny, write_inputs


def open_program(folder: pathlib.Path) -> tuple[Run, Run, dict[str, Any]]:
    """The two entries of a compiled program, as functions of flat arrays, and its facts."""
    import torch
    from torch._inductor.package import load_package

    facts = json.loads((folder / "program.json").read_text(encoding="utf-8"))["runtime"]
    layers = facts["layers"]

    def flat(entry: Callable[..., Any]) -> Run:
        def run(values: list[Any]) -> list[Array]:
            tensors = [torch.from_numpy(np.ascontiguousarray(value)) for value in values]
            caches = [tensors[3 + i * layers : 3 + (i + 1) * layers] for i in range(4)]
            prediction, *lists = entry(*tensors[:3], *caches, *tensors[-2:])
            return [prediction.numpy(), *(tensor.numpy() for group in lists for tensor in group)]

        return run

    denoise, context = (flat(load_package(str(folder / "program.pt2"), name)) for name in ("denoise", "context"))
    return denoise, context, facts


def generate_from(folder: pathlib.Path) -> None:
    """Run the program in ``folder`` on the inputs beside it; what ``main`` starts in another process."""
    denoise, context, facts = open_program(folder)
    with np.load(folder.parent / "inputs.npz") as inputs:
        start = time.perf_counter()
        video = generate(denoise, facts, inputs["prompt"], inputs["noise"], inputs["renoise"], context)
    assert "fxq" not in sys.modules
    print(f"video {list(video.shape)} in {time.perf_counter() - start:.1f} s by torch alone")
    np.save(folder.parent / "video.npy", video)


def main() -> None:
    """Quantize, compile, generate elsewhere, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--bits", default="w4a8", help="preset: w8a8, w4a8 or w4a6")
    parser.add_argument("--generate", type=pathlib.Path, help="folder of a program: only generate from it")
    options = parser.parse_args()
    if options.generate is not None:
        generate_from(options.generate)
        return
    from fxq.export.program import export_program, read_program
    from fxq.models.runtime import runtime_facts

    quantized, rollout, want = quantize_tiny(options.bits)
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        program = export_program(quantized, pathlib.Path(name) / "tiny", aoti=True, metadata=runtime_facts(rollout))
        products = read_program(program)["integer_products"]
        print(f"{products} integer products compiled in {time.perf_counter() - start:.0f} s")
        write_inputs(program.parent, rollout)
        subprocess.run([sys.executable, __file__, "--generate", str(program)], check=True)
        got = np.load(program.parent / "video.npy")
    print(f"relative difference from the video of fxq: {np.linalg.norm(got - want) / np.linalg.norm(want):.2e}")


if __name__ == "__main__":
    main()
