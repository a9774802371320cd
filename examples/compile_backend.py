"""Run a calibrated model through torch.compile: integers for the linears, inductor for the rest.

python examples/compile_backend.py

The shipped tiny model is quantized to W8A8, saved, and bound to its bundle. Its blocks are compiled with
``backend="fxq"``; what is called outside of them is compiled too. Then a rollout with a window of two chunks runs: when
the first window is over, nothing is compiled any more.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time

import torch
from torch._dynamo.utils import counters

import fxq
from fxq.cache.policy import CachePolicy
from fxq.integrations.binding import bind
from fxq.integrations.torch_compile import fxq_backend
from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny


def main() -> None:
    """Quantize, compile the parts, compare with the quantized graph."""
    rollout, _ = tiny_rollout(load_tiny(), 2, seed=1, unseen=False)
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=CachePolicy(window=6))
    model = rollout.denoiser
    quantized = fxq.quantize(model, rollout, "w8a8", progress=False)
    print(fxq.summary(quantized))

    with tempfile.TemporaryDirectory() as folder:
        options = {"fxq.recipe": bind(model, fxq.save(quantized, f"{folder}/tiny"))}
    # After `pip install`, backend="fxq" is the same.
    model.text_embedding = torch.compile(model.text_embedding, backend=fxq_backend, options=options)
    for block in model.blocks:
        block.compile(backend=fxq_backend, options=options)
        block.cross_attn.kv = torch.compile(block.cross_attn.kv, backend=fxq_backend, options=options)

    errors: list[float] = []
    graphs: list[int] = []

    def both(*args: torch.Tensor) -> object:
        want, got = quantized(*args), model(*args)
        errors.append(((got[0] - want[0]).norm() / want[0].norm()).item())
        return want

    start = time.perf_counter()
    with rollout.using(both):
        rollout.rollout(*rollout.batches[0], lambda call, _: graphs.append(counters["stats"]["unique_graphs"]))
    print(f"{len(errors)} calls in {time.perf_counter() - start:.0f} s; graphs after each call {graphs}")
    print(f"layers that still run in floats: {options['fxq.recipe'].unserved()}")
    # Inductor rounds floats in another order: a value at the edge may become the next integer.
    print(f"calls equal to 1e-5: {sum(error < 1e-5 for error in errors)}")
    print(f"largest relative error of a call {max(errors):.5f}")


if __name__ == "__main__":
    main()
