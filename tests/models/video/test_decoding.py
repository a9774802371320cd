import torch

from fxq.models.video.decoding import PixelDecoder


def test_frames_of_a_model_in_pixels_are_its_latents_within_limits():
    latents = torch.tensor([-3.0, -0.5, 0.25, 2.0], dtype=torch.bfloat16).expand(2, 3, 3, 5, 4)
    stream = PixelDecoder().begin()
    frames = stream.decode(latents)
    assert frames.dtype == torch.float32 and frames.shape == (2, 3, 3, 5, 4)
    assert frames[0, 0, 0, 0].tolist() == [-1.0, -0.5, 0.25, 1.0]
    assert torch.equal(stream.fork().decode(latents), frames)
