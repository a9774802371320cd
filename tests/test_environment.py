import torch

import fxq
from fxq.environment import environment


def test_the_environment_names_versions_and_machine():
    told = environment()
    assert told["fxq"] == fxq.__version__ and told["torch"] == torch.__version__
    assert set(told) == {"fxq", "torch", "python", "machine", "processor", "threads"}
    assert all(isinstance(value, str) and value for value in told.values())


def test_the_threads_are_those_of_the_moment():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert environment()["threads"] == str(before + 1)
    finally:
        torch.set_num_threads(before)
