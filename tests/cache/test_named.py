"""Codecs as a text and back."""

import pytest

from fxq.cache.codecs import CODECS, Klt, PerToken, Prq
from fxq.cache.named import codecs_from_text, codecs_text
from fxq.cache.settings import CacheSettingsError


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_comes_back(name):
    codec = CODECS[name]()
    keys, values = codecs_from_text(codecs_text(codec, None))
    assert keys is not None and keys.codec == codec and keys.kind == "keys" and values is None


def test_equal_settings_have_one_text():
    assert codecs_text(Klt(1.0), Prq()) == codecs_text(Klt(bits=1), Prq(stages=1))
    assert codecs_text(Klt(1.0), None) != codecs_text(None, Klt(1.0))


def test_stored_tensors_are_the_fields_of_the_kind():
    keys, _ = codecs_from_text(codecs_text(PerToken(2, 16), None))
    assert [field.name for field in keys.stored(3, 32, 24)] == ["codes", "scale"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "settings of the codecs"),
        ("[]", "expected {"),
        ('{"keys":null}', "expected {"),
        ('{"keys":null,"values":null,"more":1}', "expected {"),
        ('{"keys":7,"values":null}', "keys: expected a name"),
        ('{"keys":{"codec":"klt","bit":1},"values":null}', "did you mean 'bits'"),
        ('{"keys":null,"values":{"codec":"klt","bits":"' + "9" * 300 + '"}}', "values"),
        ("[" * 900, "nest|deep|level"),
        ('{"keys":{"codec":"__class__"},"values":null}', "unknown codec"),
    ],
)
def test_a_text_of_another_form_is_refused(text, message):
    with pytest.raises(CacheSettingsError, match=message):
        codecs_from_text(text)
