import pytest

from tests.extension.outside import Outside


@pytest.fixture
def outside(tmp_path_factory, monkeypatch):
    found = Outside(tmp_path_factory.mktemp("site"), monkeypatch)
    yield found
    found.forget()
