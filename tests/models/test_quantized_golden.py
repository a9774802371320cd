"""W8A8 rollouts of the models in official dumps against the official full-precision latents: same prompt, same noise.

    pytest -q -s -m slow tests/models/test_quantized_golden.py | grep dB

The floors lie 7 dB and more below the lowest value measured over the settings here; W4A8 falls below them.
"""

import pytest
import torch

import fxq
from fxq.metrics.latents import psnr
from tests.models.golden_file import Golden
from tests.models.official_form import SETTINGS, write
from tests.toys import recipe

FLOORS = {torch.float64: 60.0, torch.float32: 60.0, torch.bfloat16: 50.0, torch.float16: 50.0}
"""PSNR in dB by the dtype of the weights, the peak being the range of the official latents."""

pytestmark = pytest.mark.slow


def quantized_psnr(path, bits=8):
    """PSNR in dB of each video's generated frames, after calibration with the rollout of the file itself."""
    golden = Golden(path)
    rollout = golden.rollout
    if golden.dtype == torch.float64:
        rollout.denoiser.float()  # the quantized operators take float32 at most
    quantized = fxq.quantize(rollout.denoiser, rollout, recipe(bits), progress=False)
    condition, draws = rollout.batches[0]
    with rollout.using(quantized):
        got = rollout.rollout(condition, draws)[:, -draws.shape[0] :].float()
    want = golden.tensor("out.latents")[:, -draws.shape[0] :].float()
    return psnr(got, want, low=float(want.min()), high=float(want.max()))


def check(path, record_property):
    values = quantized_psnr(path)
    record_property("psnr_db", [round(float(value), 1) for value in values])
    print(f"\n{path.stem}: {', '.join(f'{value:.1f}' for value in values)} dB")
    floor = FLOORS[Golden(path).dtype]
    assert values.min() >= floor, f"{path.name}: PSNR {values.min():.1f} dB, expected at least {floor}"
    assert values.max() < 100, f"{path.name}: the latents are the official ones; nothing was quantized"


def test_the_quantized_rollout_stays_close_to_the_official_latents(golden_path, record_property):
    check(golden_path, record_property)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name",
    ["window_sink", "image_to_video", "wide", "framewise", "framewise_window", "initial", "float64", "bfloat16"],
)
def test_it_does_so_for_other_settings(name, tmp_path, record_property):
    write(tmp_path / f"{name}.safetensors", **SETTINGS[name])
    check(tmp_path / f"{name}.safetensors", record_property)


@pytest.mark.sweep
def test_four_bit_weights_fall_below_the_floor(tmp_path):
    write(tmp_path / "wide.safetensors", **SETTINGS["wide"])
    assert quantized_psnr(tmp_path / "wide.safetensors", bits=4).max() < FLOORS[torch.float32]
