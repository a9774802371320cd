import pytest

from tests.export.hub.server import Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the client of this process talks to, with a cache of its own."""
    from huggingface_hub import constants

    served = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield served
    served.close()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """The folder of a small bundle."""
    import fxq
    from tests.toys import recipe, rows, toy

    q = fxq.quantize(toy(), [rows(32, 96)], recipe(4), progress=False)
    return fxq.save(q, tmp_path_factory.mktemp("hub") / "toy-w4a8", metrics={"psnr_db": 41.5})
