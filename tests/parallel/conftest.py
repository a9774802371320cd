import pytest

from tests.parallel.ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks():
    """Two gloo processes, started once."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()
