"""Replays dumps of the official Self-Forcing code.

They lie in the folder named by FXQ_GOLDEN, or else in ``../shared/golden`` beside the repository root.
"""

import torch

from tests.models.golden import Golden, replay

TOLERANCE = 1e-4
TOLERANCE_BFLOAT16 = 0.25


def test_every_call_cache_and_latent_equals_the_official_code(golden_path):
    low_precision = Golden(golden_path).tensors["out.latents"].dtype == torch.bfloat16
    tolerance = TOLERANCE_BFLOAT16 if low_precision else TOLERANCE
    errors = replay(golden_path)
    compared = {name.split(".")[0] for name in errors}
    assert {"call", "out"} <= compared
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{worst} differs by {errors[worst]:.2e}; {len(errors)} tensors compared"
    exact = {n: e for n, e in errors.items() if n.endswith(".t") or n.startswith("schedule.")}
    assert max(exact.values()) <= TOLERANCE, f"timesteps differ: {exact}"
