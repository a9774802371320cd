"""What a program without fxq must know to drive an exported denoiser."""

from __future__ import annotations

import torch

from fxq.models.self_forcing import SelfForcingRollout


def runtime_facts(rollout: SelfForcingRollout) -> dict[str, object]:
    """Model sizes, cache policy and steps of a rollout, as JSON values.

    ``timesteps``/``sigmas`` are those of a chunk's denoising calls, warped; the context call has ``context_timestep``.
    ``window`` and ``sink`` count frames, window -1 keeps all.
    """
    config, sampler, draws = rollout.model.config, rollout.sampler, rollout.batches[0][1]
    frames, channels, height, width = draws.shape
    _, patch_rows, patch_columns = config.patch_size
    rows, columns = height // patch_rows, width // patch_columns

    def steps(first: bool) -> dict[str, list[float]]:
        timesteps = sampler.timesteps(first)
        return {
            "timesteps": list(timesteps),
            "sigmas": sampler.schedule.sigma(torch.tensor(timesteps, dtype=torch.float32)).tolist(),
        }

    return {
        "layers": config.num_layers,
        "heads": config.num_heads,
        "head_dim": config.head_dim,
        "text_tokens": config.text_len,
        "text_dim": config.text_dim,
        "frames": frames,
        "latent": [channels, height, width],
        "token_rows": rows,
        "token_columns": columns,
        "tokens_per_frame": rows * columns,
        "frames_per_chunk": sampler.frames_per_chunk,
        "window": sampler.cache.window,
        "sink": sampler.cache.sink,
        "prediction": sampler.schedule.prediction,
        "first_chunk": steps(True),
        "chunk": steps(False),
        "context_timestep": sampler.context_noise,
    }
