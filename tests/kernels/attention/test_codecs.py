"""One reader knows the codecs; texts of unknown form and length are refused."""

import pytest
import torch

import fxq.cache.named
from fxq.kernels.attention import codecs
from fxq.kernels.attention.codecs import MOST_TEXT, channels, codecs_of, register


def test_a_text_is_read_once():
    text = '{"keys":{"codec":"klt"},"values":null}'
    assert codecs_of(text) is codecs_of(text)
    assert codecs_of(text)[1] is None


def test_a_long_text_is_not_read():
    with pytest.raises(ValueError, match=f"at most {MOST_TEXT}"):
        codecs_of(" " * (MOST_TEXT + 1))


def test_without_a_reader_the_error_names_the_module(monkeypatch):
    monkeypatch.setattr(codecs, "_READERS", [])
    codecs_of.cache_clear()
    with pytest.raises(ValueError, match=r"import fxq\.cache\.named"):
        codecs_of("{}")


def test_another_reader_takes_the_place_of_the_first():
    try:
        register(lambda text: (None, None))
        assert codecs_of("anything") == (None, None)
    finally:
        register(fxq.cache.named.codecs_from_text)
    with pytest.raises(ValueError, match="settings"):
        codecs_of("anything")


@pytest.mark.parametrize("videos", [1, 2])
def test_weights_may_come_before_the_basis(videos):
    random = torch.Generator().manual_seed(0)
    x, basis, mean = (torch.randn(s, generator=random) for s in ((2, 9, 3, 4), (videos, 3, 8, 4), (videos, 3, 8)))
    weights = torch.randn(2, 3, 5, 9, generator=random).softmax(-1)
    got = channels(torch.einsum("bhsl,blhr->bshr", weights, x), basis, mean)
    values = torch.einsum("blhr,bhdr->blhd", x, basis.expand(2, -1, -1, -1)) + mean.unsqueeze(1)
    assert torch.allclose(got, torch.einsum("bhsl,blhd->bshd", weights, values), atol=1e-5)
