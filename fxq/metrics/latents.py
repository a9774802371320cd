"""Errors of quantized rollouts against full precision: same prompts, same noise, per video."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
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
    return np.minimum(20 * np.log10(high - low) - 10 * np.log10(np.maximum(mse, _TINY)), ceiling)


def forced_chunks(rollout: Rollout, modules: Mapping[str, Callable[..., object]]) -> tuple[dict[str, Floats], Floats]:
    """Error of each module's predictions on the full-precision trajectory, chunk by chunk, without accumulation.

    The full-precision model drives the rollout; every denoising call is repeated through each module with the same
    inputs and caches.

    Args:
        rollout: prompts and noise.
        modules: stand-ins of the denoiser by name.

    Returns:
        Per name, float64 [V, chunks]: mean squared error over a video's denoising calls of a chunk (context calls have
        no prediction that is used); and how many calls that were, float64 [V, chunks]. A chunk without one has error 0.

    Raises:
        ValueError: when a rollout makes no call of kind "denoise".
    """
    seen: list[list[tuple[int, dict[str, Floats]]]] = []  # of each batch, per call: its chunk and errors [B] by name
    for condition, draws in rollout.batches:
        calls: list[tuple[int, dict[str, Floats]]] = []

        def shadow(*args: object, calls: list[tuple[int, dict[str, Floats]]] = calls) -> object:
            output = rollout.denoiser(*args)
            call: Call | None = current_call()
            if call is None or call.kind != "denoise":
                return output
            want = _prediction(output).double()
            errors = {}
            for name, module in modules.items():
                error = (_prediction(module(*args)).double() - want).square()
                errors[name] = error.flatten(1).mean(1).cpu().numpy()
            calls.append((call.chunk, errors))
            return output

        with rollout.using(shadow):
            rollout.rollout(condition, draws)
        if not calls:
            raise ValueError(
                f"{type(rollout).__name__} makes no call of kind 'denoise', so there is no error to measure"
            )
        seen.append(calls)
    chunks = 1 + max(chunk for calls in seen for chunk, _ in calls)
    sizes = [draws.batch for _, draws in rollout.batches]
    counts = [np.zeros((size, chunks)) for size in sizes]
    sums = {name: [np.zeros((size, chunks)) for size in sizes] for name in modules}
    for i, calls in enumerate(seen):
        for chunk, errors in calls:
            counts[i][:, chunk] += 1
            for name, values in errors.items():
                sums[name][i][:, chunk] += values
    made = np.concatenate(counts)
    return {name: np.concatenate(parts) / np.maximum(made, 1) for name, parts in sums.items()}, made


def teacher_forced(rollout: Rollout, modules: Mapping[str, Callable[..., object]]) -> dict[str, Floats]:
    """:func:`forced_chunks`, the mean over all of a video's denoising calls: per name float64 [V].

    Raises:
        ValueError: when a rollout makes no call of kind "denoise".
    """
    errors, calls = forced_chunks(rollout, modules)
    return {name: mean_of_calls(values, calls) for name, values in errors.items()}


def mean_of_calls(errors: Floats, calls: Floats) -> Floats:
    """Errors of chunks [V, chunks], each weighted by its number of calls [V, chunks]: float64 [V]."""
    mean: Floats = (errors * calls).sum(1) / calls.sum(1)
    return mean


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
