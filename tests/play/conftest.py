import pytest

import fxq
from fxq.cli.options.models import ModelFiles
from fxq.cli.options.videos import VideoFiles
from fxq.cli.play import make_stage
from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A bundle of the shipped model."""
    model = load_tiny()
    q = fxq.quantize(model, tiny_rollout(model, 1, seed=0, unseen=True)[0], "w8a8-dynamic", progress=False)
    return fxq.save(q, tmp_path_factory.mktemp("play") / "w8a8-dynamic")


@pytest.fixture(scope="session")
def stage(bundle):
    """The shipped model and the bundle."""
    return make_stage("tiny", ModelFiles(), VideoFiles(), [bundle])
