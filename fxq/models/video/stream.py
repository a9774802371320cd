"""A rollout as its chunks come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from fxq.calibration.rollout import Condition, Draws, Rollout


def chunks_of(
    rollout: Rollout, condition: Condition, draws: Draws, module: Callable[..., object] | None = None
) -> Iterator[Tensor]:
    """Latents [B, F, C, H, W] of each unit as soon as it is made; all of them are those of :meth:`Rollout.rollout`.

    Args:
        rollout: the model's loop.
        condition: of one batch.
        draws: of it.
        module: what runs in the denoiser's place; None: the denoiser.
    """
    with rollout.using(module or rollout.denoiser):
        state = rollout.begin(condition, draws)
    for _ in range(rollout.units(condition, draws)):
        with rollout.using(module or rollout.denoiser):
            after = rollout.advance(state)
        before, state = state.latents.shape[1], after
        yield after.latents[:, before:]
