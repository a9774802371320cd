import shutil

import pytest

from tests.attacks import corpus


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Every bundle of the corpus, with the programs beside them."""
    folder = tmp_path_factory.mktemp("attacks")
    return {name: corpus.make(name, folder) for name in corpus.MAKERS}


@pytest.fixture
def bundle(bases, tmp_path):
    """A copy of the bundle with outlier channels and 4-bit weights."""
    return shutil.copytree(bases["w4"].folder, tmp_path / "bundle")


@pytest.fixture
def program(bases, tmp_path):
    """A copy of its program."""
    return shutil.copytree(bases["w4"].folder.parent / "w4-program", tmp_path / "program")
