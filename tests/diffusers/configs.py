"""All tiny configurations of diffusers transformers, and the few that every test run takes."""

from tests.diffusers import audio, image, video

CASES = (*video.CASES, *image.CASES, *audio.CASES)
CAPTURED = tuple(case for case in CASES if not case.refused)
REFUSED = tuple(case for case in CASES if case.refused)
QUICK = (
    "WanTransformer3DModel",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
)
"""Names of cases that take little time and have little in common."""

SLOW = ("SkyReelsV2Transformer3DModel",)
"""Names of cases that `make test` takes as well: other attention, modulation and captures; `make test-all` has all."""

SAVED = (
    "WanTransformer3DModel",
    "FluxTransformer2DModel (guidance)",
    "LTX2VideoTransformer3DModel",
    "CogView4Transformer2DModel",
    "QwenImageTransformer2DModel",
    "ZImageTransformer2DModel",
)
"""Names of cases that are also saved and loaded."""
