"""One reader knows the codecs; texts of unknown form and length are refused."""

import pytest

import fxq.cache.named
from fxq.kernels.attention import codecs
from fxq.kernels.attention.codecs import MOST_TEXT, codecs_of, register


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
