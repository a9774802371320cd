import torch


def test_uninitialised_floats_are_nan():
    if not torch.cuda.is_available():
        assert torch.empty(5).isnan().all()
