"""Errors of quantized rollouts against full precision: same prompts, same noise, per video."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxq.calibration.rollout import Call, Rollout, current_call

Floats = NDArray[np.float64]

_TINY = float(np.finfo(np.float64).tiny)


def latent_mse(got: Tensor, want: Tensor) -> Floats:
    """Mean squared error of each video; ``got`` and ``want`` [V, F, C, H, W]; returns float64 [V]."""
    result: Floats = (got.double() - want.double()).square().flatten(1).mean(1).numpy()
    return result


def chunk_mse(got: Tensor, want: Tensor, frames_per_chunk: int) -> Floats:
    """Mean squared error of each chunk of each video, float64 [V, chunks]."""
    error = (got.double() - want.double()).square().unflatten(1, (-1, frames_per_chunk))
    result: Floats = error.flatten(2).mean(2).numpy()
    return result


def psnr(got: Tensor, want: Tensor, low: float = -1.0, high: float = 1.0, ceiling: float = 100.0) -> Floats:
    """Peak signal-to-noise ratio of each video in dB, clamped to ``low..high``; identical videos get ``ceiling``."""
    mse = latent_mse(got.clamp(low, high), want.clamp(low, high))
    return np.minimum(10 * np.log10((high - low) ** 2 / np.maximum(mse, _TINY)), ceiling)


def teacher_forced(rollout: Rollout, modules: Mapping[str, Callable[..., object]]) -> dict[str, Floats]:
    """Error of each module's prediction on the full-precision trajectory, without accumulation.

    The full-precision model drives the rollout; every denoising call is repeated through each module with the same
    inputs and caches.

    Args:
        rollout: prompts and noise.
        modules: stand-ins of the denoiser by name.

    Returns:
        Per name, float64 [V]: mean squared error over a video's denoising calls (context calls have no prediction
        that is used).

    Raises:
        ValueError: when a rollout makes no call of kind "denoise".
    """
    sums: dict[str, list[Floats]] = {name: [] for name in modules}
    for condition, draws in rollout.batches:
        errors = {name: torch.zeros(draws.batch, dtype=torch.float64) for name in modules}
        calls = 0

        def shadow(*args: object, errors: dict[str, Tensor] = errors) -> object:
            nonlocal calls
            output = rollout.denoiser(*args)
            call: Call | None = current_call()
            if call is None or call.kind != "denoise":
                return output
            calls += 1
            for name, module in modules.items():
                got = _prediction(module(*args)).double()
                errors[name] += (got - _prediction(output).double()).square().flatten(1).mean(1)
            return output

        with rollout.using(shadow):
            rollout.rollout(condition, draws)
        if not calls:
            raise ValueError(
                f"{type(rollout).__name__} makes no call of kind 'denoise', so there is no error to measure"
            )
        for name in modules:
            sums[name].append((errors[name] / calls).numpy())
    return {name: np.concatenate(parts) for name, parts in sums.items()}


def _prediction(output: Any) -> Tensor:
    prediction = output if isinstance(output, Tensor) else output[0]
    assert isinstance(prediction, Tensor)
    return prediction


def bootstrap(values: Floats, resamples: int = 2000, seed: int = 0) -> tuple[Floats, Floats]:
    """95 % percentile-bootstrap bounds of the mean over the first axis; ``values`` [V, ...]."""
    generator = np.random.default_rng(seed)
    index = generator.integers(len(values), size=(resamples, len(values)))
    means = values[index].mean(axis=1)
    return np.quantile(means, 0.025, axis=0), np.quantile(means, 0.975, axis=0)


def paired_ratio(a: Floats, b: Floats) -> tuple[float, float, float]:
    """Geometric mean of ``a / b`` over videos with its 95 % bootstrap interval."""
    logs = np.log(np.maximum(a, _TINY)) - np.log(np.maximum(b, _TINY))
    low, high = bootstrap(logs)
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))
