"""Bring your own autoregressive model: an adapter is one short class.

python examples/own_rollout.py

The model here is a toy that predicts the next chunk of a signal from the last one; the adapter below is all that fxq
needs to calibrate on real rollouts, to measure chunk sensitivity and to weight the reconstruction with it. The command
line takes it too: ``fxq quantize --model examples.own_rollout:make_rollout --recipe w8a8 --out out/own``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import fxq

CHUNK, CHUNKS, WIDTH, STEPS = 2, 4, 64, (1000.0, 500.0)


class Denoiser(nn.Module):
    """(noisy chunk [B, F, 64], previous clean chunk [B, F, 64], time [B]) -> clean chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, past: Tensor, t: Tensor) -> Tensor:
        """Predict the clean chunk."""
        h = x + past + self.time_embedding(t[:, None] / 1000).unsqueeze(1)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


@dataclasses.dataclass(frozen=True)
class ToyState(fxq.State):
    """The cache is the last clean chunk."""

    past: Tensor


class ToyRollout(fxq.Rollout):
    """Two denoising steps a chunk, each chunk continuing the last."""

    def units(self, condition: fxq.Condition, draws: fxq.Draws) -> int:
        """Chunks of a video."""
        return CHUNKS

    def begin(self, condition: fxq.Condition, draws: fxq.Draws) -> ToyState:
        """Start from the prompt."""
        return ToyState(condition, draws, 0, torch.zeros(draws.batch, 0, WIDTH), condition["prompt"])

    def advance(self, state: fxq.State, on_call: fxq.OnCall | None = None) -> ToyState:
        """Denoise one chunk."""
        assert isinstance(state, ToyState)
        unit, batch = state.next_unit, state.draws.batch
        lo, hi = unit * CHUNK, (unit + 1) * CHUNK
        x = state.draws.noise[:, lo:hi, 0, 0]
        for step, timestep in enumerate(STEPS):
            call = fxq.Call(unit * len(STEPS) + step, "denoise", (fxq.Span(unit, step, (lo, hi), timestep),), 1)
            clean = self.call(call, x, state.past, torch.full((batch,), timestep), on_call=on_call)
            x = 0.5 * clean + 0.5 * state.draws.renoise(unit, step, CHUNK)[:, :, 0, 0]
        latents = torch.cat((state.latents, clean), dim=1)
        return ToyState(state.condition, state.draws, unit + 1, latents, clean)

    def example_call(self) -> tuple[tuple[Any, ...], Any]:
        """Two samples; the batch size is dynamic."""
        args = (torch.randn(2, CHUNK, WIDTH), torch.randn(2, CHUNK, WIDTH), torch.full((2,), 500.0))
        return args, ({0: Dim.AUTO}, {0: Dim.AUTO}, {0: Dim.AUTO})


def make_rollout(videos: int, seed: int) -> ToyRollout:
    """What the command line calls."""
    torch.manual_seed(seed)
    draws = fxq.Draws(range(seed, seed + videos), (CHUNK * CHUNKS, 1, 1, WIDTH))
    return ToyRollout(Denoiser().eval(), [({"prompt": torch.randn(videos, CHUNK, WIDTH)}, draws)])


def main() -> None:
    """Quantize the toy and measure it."""
    rollout = make_rollout(8, 0)
    quantized = fxq.quantize(rollout.denoiser, rollout, "w8a8")
    print(fxq.summary(quantized))
    want = rollout.rollout(*rollout.batches[0])
    with rollout.using(quantized):
        got = rollout.rollout(*rollout.batches[0])
    print(f"relative error of the rollout {((got - want).norm() / want.norm()).item():.4f}")
    print("chunk sensitivity", [round(a, 3) for a in fxq.sensitivity(rollout, "w8a8").tolist()])


if __name__ == "__main__":
    main()
