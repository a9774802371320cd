"""Generate a whole video with numpy and ONNX Runtime alone.

python examples/onnx_rollout.py

The first half of this file is a runtime: it needs numpy and onnxruntime, neither torch nor fxq. ``main`` quantizes and
exports the tiny model, runs this file again in a process of its own, and compares the video with the one of fxq.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Run = Callable[[list[Any]], list[Array]]
"""The denoiser: flat inputs in the exported order -> prediction, then keys, values, text keys, text values."""


def open_session(path: pathlib.Path) -> tuple[Run, dict[str, Any]]:
    """The denoiser of an .onnx file and the facts stored in it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [info.name for info in session.get_inputs()]
    facts = json.loads(session.get_modelmeta().custom_metadata_map["fxq"])["runtime"]
    return lambda values: session.run(None, dict(zip(names, values, strict=True))), facts


def rope_tables(facts: dict[str, Any], start: int) -> tuple[Array, Array]:
    """Cosines and sines of the rotary embedding of the chunk whose first frame is ``start``."""
    frames, rows, columns = facts["frames_per_chunk"], facts["token_rows"], facts["token_columns"]
    spatial = 2 * (facts["head_dim"] // 6)
    angles = []
    for axis, (count, first) in enumerate(((frames, start), (rows, 0), (columns, 0))):
        size = spatial if axis else facts["head_dim"] - 2 * spatial
        frequency = 1.0 / 10000.0 ** (np.arange(0, size, 2) / size)
        angle = np.arange(first, first + count)[:, None] * frequency
        shape = [1, 1, 1, -1]
        shape[axis] = count
        angles.append(np.broadcast_to(angle.reshape(shape), (frames, rows, columns, angle.shape[1])))
    angle = np.concatenate(angles, axis=-1).reshape(frames * rows * columns, -1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


class Generator:
    """Chunks, steps and caches of the few-step rollout; one instance per video batch."""

    def __init__(self, run: Run, facts: dict[str, Any], prompt: Array, context: Run | None = None) -> None:
        self.run, self.context, self.facts, self.layers = run, context or run, facts, facts["layers"]
        batch, tokens, _ = prompt.shape
        self.prompt = np.pad(prompt, ((0, 0), (0, facts["text_tokens"] - tokens), (0, 0)))
        empty = np.zeros((batch, 0, facts["heads"], facts["head_dim"]), np.float32)
        self.keys, self.values = [empty] * self.layers, [empty] * self.layers
        self.text: list[Array] = [empty] * (2 * self.layers)

    def call(self, run: Run, x: Array, timestep: float, start: int) -> list[Array]:
        """One denoiser call; the first one fills the text cache and later ones pass an empty prompt."""
        t = np.full(x.shape[:2], timestep, np.float32)
        caches = [*self.text, *self.keys, *self.values]
        prediction, *rest = run([x, t, self.prompt, *caches, *rope_tables(self.facts, start)])
        self.prompt, self.text = self.prompt[:, :0], rest[2 * self.layers :]
        return [prediction, *rest[: 2 * self.layers]]

    def evict(self) -> None:
        """Drop the oldest frames behind the sink, so that the next chunk fits the window."""
        facts, tokens = self.facts, self.facts["tokens_per_frame"]
        excess = self.keys[0].shape[1] + (facts["frames_per_chunk"] - facts["window"]) * tokens
        if facts["window"] != -1 and excess > 0:
            sink = facts["sink"] * tokens
            kept = [np.concatenate((c[:, :sink], c[:, sink + excess :]), axis=1) for c in (*self.keys, *self.values)]
            self.keys, self.values = kept[: self.layers], kept[self.layers :]

    def chunk(self, index: int, x: Array, renoise: Sequence[Array]) -> Array:
        """Latents of one chunk from its initial noise and the noise between its steps."""
        steps, start = self.facts["first_chunk" if index == 0 else "chunk"], index * self.facts["frames_per_chunk"]
        self.evict()
        for step, (timestep, sigma) in enumerate(zip(steps["timesteps"], steps["sigmas"], strict=True)):
            latents = self.call(self.run, x, timestep, start)[0]
            if self.facts["prediction"] == "flow":
                latents = (x.astype(np.float64) - sigma * latents).astype(np.float32)
            if step + 1 < len(steps["sigmas"]):
                following = np.float32(steps["sigmas"][step + 1])
                x = (1 - following) * latents + following * renoise[step]
        new = self.call(self.context, latents, self.facts["context_timestep"], start)[1:]
        caches = [np.concatenate(pair, axis=1) for pair in zip((*self.keys, *self.values), new, strict=True)]
        self.keys, self.values = caches[: self.layers], caches[self.layers :]
        return latents


def generate(
    run: Run, facts: dict[str, Any], prompt: Array, noise: Array, renoise: Array, context: Run | None = None
) -> Array:
    """A video [B, F, C, H, W].

    Args:
        run: the denoiser.
        facts: of the rollout, as stored with the export.
        prompt: prompt embeddings [B, tokens, text_dim].
        noise: initial noise [B, F, C, H, W].
        renoise: noise between the steps [chunks, steps - 1, B, frames per chunk, C, H, W].
        context: the denoiser for calls that write the cache, where it is one of its own.
    """
    size, generator = facts["frames_per_chunk"], Generator(run, facts, prompt, context)
    chunks = [generator.chunk(i, noise[:, i * size : (i + 1) * size], renoise[i]) for i in range(len(renoise))]
    return np.concatenate(chunks, axis=1)


def generate_from(folder: pathlib.Path) -> None:
    """Run the export in ``folder`` on its inputs; what ``main`` starts in another process."""
    run, facts = open_session(folder / "tiny.onnx")
    with np.load(folder / "inputs.npz") as inputs:
        start = time.perf_counter()
        video = generate(run, facts, inputs["prompt"], inputs["noise"], inputs["renoise"])
    assert "torch" not in sys.modules
    print(f"video {list(video.shape)} in {time.perf_counter() - start:.1f} s by numpy and onnxruntime")
    np.save(folder / "video.npy", video)


def write_inputs(folder: pathlib.Path, rollout: Any) -> None:
    """Prompt and noise of a rollout's first batch, so that another program can generate the same video."""
    condition, draws = rollout.batches[0]
    size, steps = rollout.sampler.frames_per_chunk, len(rollout.sampler.steps)
    renoise = [
        np.stack([draws.renoise(chunk, step, size).numpy() for step in range(steps - 1)])
        for chunk in range(rollout.units(condition, draws))
    ]
    arrays = {"prompt": condition["prompt_embeds"].numpy(), "noise": draws.noise.numpy(), "renoise": np.stack(renoise)}
    np.savez(folder / "inputs.npz", **arrays)


def quantize_tiny(bits: str) -> tuple[Any, Any, Any]:
    """The tiny model quantized with searched ranges, a rollout of two new videos, and fxq's own result for it."""
    import dataclasses

    import torch

    import fxq
    from fxq.lab import tiny_rollout
    from fxq.models.tiny import load_tiny

    model = load_tiny()
    recipe = dataclasses.replace(fxq.PRESETS[bits], methods=fxq.PRESETS[bits].methods[:1], weighting="uniform")
    calibration, _ = tiny_rollout(model, 4, seed=1, unseen=False)
    quantized = fxq.quantize(model, calibration, recipe, progress=False)
    rollout, _ = tiny_rollout(model, 2, seed=2, unseen=True)
    with rollout.using(quantized), torch.no_grad():
        video = rollout.rollout(*rollout.batches[0])
    return quantized, rollout, video.numpy()


def main() -> None:
    """Quantize, export, check, generate elsewhere, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--bits", default="w4a8", help="preset: w8a8, w4a8 or w4a6")
    parser.add_argument("--generate", type=pathlib.Path, help="folder of an export: only generate from it")
    options = parser.parse_args()
    if options.generate is not None:
        generate_from(options.generate)
        return
    from fxq.export.onnx import check_onnx, export_onnx
    from fxq.models.runtime import runtime_facts

    quantized, rollout, want = quantize_tiny(options.bits)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        path = export_onnx(quantized, folder / "tiny.onnx", metadata=runtime_facts(rollout))
        layers = check_onnx(path)
        print(f"{len(layers)} layers on integer kernels of ONNX Runtime, {path.stat().st_size / 1e6:.2f} MB")
        write_inputs(folder, rollout)
        subprocess.run([sys.executable, __file__, "--generate", name], check=True)
        got = np.load(folder / "video.npy")
    print(f"relative difference from the video of fxq: {np.linalg.norm(got - want) / np.linalg.norm(want):.2e}")


if __name__ == "__main__":
    main()
