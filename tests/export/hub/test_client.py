import builtins

import pytest

from fxq.export.hub.client import HubError, UnreachableError, client, is_repository, speaking


@pytest.mark.parametrize("name", ["org/name", "a/b", "Org-1/na.me_2"])
def test_repositories_have_two_names(name):
    assert is_repository(name)


@pytest.mark.parametrize("name", ["name", "a/b/c", "/a/b", "../b", "a/..", "a/", "org/na me", "a\\b", "org/name\n"])
def test_anything_else_is_a_path(name):
    assert not is_repository(name)


def test_a_missing_client_names_the_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "huggingface_hub":
            raise ModuleNotFoundError("No module named 'huggingface_hub'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(HubError, match=r"pip install 'fxq\[hub\]'"):
        client()


def test_errors_of_the_network_and_of_this_library_are_told_apart():
    with (
        pytest.raises(UnreachableError, match=r"org/x on .* does not answer: ConnectionError: gone"),
        speaking("org/x"),
    ):
        raise ConnectionError("gone")
    with pytest.raises(KeyError), speaking("org/x"):
        raise KeyError("ours")
